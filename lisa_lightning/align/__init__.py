"""Defenses of alignment, one file each: conf/align/NAME.yaml names the class, an `Aligner`."""
