// SPDX-License-Identifier: MIT
// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), forward and backward, with or without a residual to
// add first: the formulas, the layout and the floor are in norm.cuh. r is not kept: the backward pass reads
// the row anyway and sums its squares again.
//
// <LAYER, RESIDUAL, T of x, h and dx, W of w and dw, O of y and dy, VEC, ITEMS>
// instantiate: norm_forward<false,{false,true},float,float,float,{4,1},0>
// instantiate: norm_forward<false,false,float,float,float,4,{1,2,4}>
// instantiate: norm_forward<false,true,float,float,float,4,{1,4}>
// instantiate: norm_forward<false,{false,true},__half,__half,__half,{8,1},0>
// instantiate: norm_forward<false,false,__half,__half,__half,8,{1,2,4}>
// instantiate: norm_forward<false,true,__half,__half,__half,8,{1,4}>
// instantiate: norm_forward<false,{false,true},__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,{8,1},0>
// instantiate: norm_forward<false,false,__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,2,4}>
// instantiate: norm_forward<false,true,__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,4}>
// instantiate: norm_forward<false,false,__half,float,{float,__half},{8,1},0>
// instantiate: norm_forward<false,false,__half,float,{float,__half},8,{1,2}>
// instantiate: norm_forward<false,false,__nv_bfloat16,float,{float,__nv_bfloat16},{8,1},0>
// instantiate: norm_forward<false,false,__nv_bfloat16,float,{float,__nv_bfloat16},8,{1,2}>
// instantiate: norm_backward<false,{false,true},float,float,float,{4,1},0>
// instantiate: norm_backward<false,{false,true},float,float,float,4,{1,2,4}>
// instantiate: norm_backward<false,{false,true},__half,__half,__half,{8,1},0>
// instantiate: norm_backward<false,{false,true},__half,__half,__half,8,{1,2}>
// instantiate: norm_backward<false,{false,true},__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,{8,1},0>
// instantiate: norm_backward<false,{false,true},__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,2}>
// instantiate: norm_backward<false,false,__half,float,{float,__half},{8,1},0>
// instantiate: norm_backward<false,false,__half,float,{float,__half},8,{1,2}>
// instantiate: norm_backward<false,false,__nv_bfloat16,float,{float,__nv_bfloat16},{8,1},0>
// instantiate: norm_backward<false,false,__nv_bfloat16,float,{float,__nv_bfloat16},8,{1,2}>
// instantiate: column_sum<{float,__half,__nv_bfloat16},{4,1}>
#include "norm_backward.cuh"
#include "norm_forward.cuh"
