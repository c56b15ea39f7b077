"""Other systems' launch commands, read as an experiment file and the `pdlab serve` commands that start it.

`shell` makes commands of a script, `programs` and one file a system say what their words mean, `checks` finds what their authors got wrong,
`deployment_of` writes ours.
"""
