"""`answer`: a model answers the questions of a shard folder. Shards in, shards out."""
