// The kernels of shard.h for one instruction set; included once per set by isa.h.

#include "cpu/shard_lanes.inl"
#include "cpu/shard_shrink.inl"
#include "cpu/shard_tile.inl"
#include "cpu/shard_expand.inl"
#include "cpu/shard_outer.inl"
