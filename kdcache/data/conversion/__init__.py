"""Conversion of a data set of any layout into a folder of one's own."""
