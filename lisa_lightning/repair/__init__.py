"""Defenses after fine-tuning, one file each: a finished adapter in, a repaired one out."""
