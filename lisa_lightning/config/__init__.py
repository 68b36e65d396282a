"""Configs: the command's arguments, the rules for every key, and the messages for what is wrong."""
