"""Studies of PEER models: `python -m studies.NAME` runs the one in the folder NAME."""
