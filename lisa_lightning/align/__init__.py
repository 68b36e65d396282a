"""Ways of aligning, one file each: conf/align/NAME.yaml names the class, a `lisa_lightning.method.base.Method`."""
