"""The user's tasks, one small file each: prompt, target, and the rule of what is correct."""
