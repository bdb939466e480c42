"""Pages of the documentation that are made from data, `python -m pages`; the site is built from them and the others by mkdocs.

What is made is in the repository; a test makes it again and compares.
"""
