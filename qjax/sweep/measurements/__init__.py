"""The measurements of the house, a file each: what is asked, the columns with type, unit and meaning, the function."""
