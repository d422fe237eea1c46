"""`plan`: what a recipe will need, in memory, disk, network and hours, from the models' config files alone."""
