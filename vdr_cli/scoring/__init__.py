"""`vdr score`: reading rows, tokens, batches, columns, writing parts that survive a kill."""
