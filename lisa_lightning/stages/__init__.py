"""The stages of a run, one file each, named as in the config; what they share is in setting.py and train.py."""
