"""The formats that a row can have, one module each; `table.py` lists them."""
