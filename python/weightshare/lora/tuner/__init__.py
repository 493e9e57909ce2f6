"""PEFT tuner: Mixture of Shards as an adapter of PEFT."""
