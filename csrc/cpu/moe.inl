// The kernels of moe.h for one instruction set; included once per set by isa.h. WS_PAIRS is 1 where
// bfloat16 is multiplied in pairs.

#include "cpu/moe_tile.inl"
#include "cpu/moe_pack.inl"
#include "cpu/moe_active.inl"
#include "cpu/moe_move.inl"
#include "cpu/moe_forward.inl"
#include "cpu/moe_backward.inl"
