"""The commands of QMP, a module for each subject."""
