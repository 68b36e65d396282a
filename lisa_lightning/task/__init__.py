"""Tasks of the user, one file each: instruction, target and the rule for a correct answer."""
