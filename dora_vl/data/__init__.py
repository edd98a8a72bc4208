"""From a publisher's file to batches: records, turns, pictures, samples, sampler, collator, bad samples.

Nothing is re-exported here, so that `data.records` and `data.turns` stay importable without torch.
"""
