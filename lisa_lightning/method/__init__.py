"""Defenses of fine-tuning, one file each: conf/method/NAME.yaml names the class."""
