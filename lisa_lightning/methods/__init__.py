"""Training-time defenses, one file each; `conf/method/NAME.yaml` names the class."""
