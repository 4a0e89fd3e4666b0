"""`localign explore`: one web page that compares what models make of every patch of some images."""
