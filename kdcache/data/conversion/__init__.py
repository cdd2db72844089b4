"""A data set written as another one: a folder of one's own, from any layout.

folder_writer.py  the files of such a folder, linked where they can be
convert.py        any data set as a folder
"""
