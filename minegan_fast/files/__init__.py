"""Other people's files, read as data that cannot run anything; and ours, written so that a kill leaves them whole."""
