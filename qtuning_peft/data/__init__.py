"""Small data sets that are installed with the package; `README.md` beside them names sources and licences."""
