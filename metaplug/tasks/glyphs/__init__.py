"""The embedded data set: letters of six scripts in sixteen faces; nothing is downloaded.

`source` is the task source with its cache, `rendering` draws the letters, and `table.json` says
which letters, faces and splits there are.
"""
