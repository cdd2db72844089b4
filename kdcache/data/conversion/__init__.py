"""Convert a data set of any layout to a folder.

folder_writer.py  the files of such a folder, linked where they can be
convert.py        any data set as a folder
"""
