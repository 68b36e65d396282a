"""The user's tasks, one small file each: instruction, target, and the rule of what is correct."""
