"""Files and folders: strict JSON, paths of users, atomic directories, direct I/O, locks."""
