"""The stages of a run, one file each; results are cached by everything that determines them."""
