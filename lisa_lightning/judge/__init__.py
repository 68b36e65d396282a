"""Judges of answers, one file each: conf/judge/NAME.yaml names the class."""
