"""`vdr report`: one HTML page of a run or of scored completions, and its charts."""
