// SPDX-License-Identifier: MIT
// LayerNorm (Ba et al. 2016, arXiv:1607.06450), forward and backward, with or without a residual to add
// first: the formulas, the layout and the floor are in norm.cuh. Mean and variance come from one pass.
//
// <LAYER, RESIDUAL, T of x, h and dx, W of w, b, dw and db, O of y and dy, VEC, ITEMS>
// O is fp32 under autocast, whatever T and W.
// instantiate: norm_forward<true,{false,true},float,float,float,{4,1},0>
// instantiate: norm_forward<true,false,float,float,float,4,{1,2,4}>
// instantiate: norm_forward<true,true,float,float,float,4,{1,4}>
// instantiate: norm_forward<true,{false,true},__half,__half,__half,{8,1},0>
// instantiate: norm_forward<true,false,__half,__half,__half,8,{1,2,4}>
// instantiate: norm_forward<true,true,__half,__half,__half,8,{1,4}>
// instantiate: norm_forward<true,{false,true},__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,{8,1},0>
// instantiate: norm_forward<true,false,__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,2,4}>
// instantiate: norm_forward<true,true,__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,4}>
// instantiate: norm_forward<true,false,__half,{__half,float},float,{8,1},0>
// instantiate: norm_forward<true,false,__half,{__half,float},float,8,{1,2}>
// instantiate: norm_forward<true,false,__nv_bfloat16,{__nv_bfloat16,float},float,{8,1},0>
// instantiate: norm_forward<true,false,__nv_bfloat16,{__nv_bfloat16,float},float,8,{1,2}>
// instantiate: norm_backward<true,{false,true},float,float,float,{4,1},0>
// instantiate: norm_backward<true,{false,true},float,float,float,4,{1,2,4}>
// instantiate: norm_backward<true,{false,true},__half,__half,__half,{8,1},0>
// instantiate: norm_backward<true,{false,true},__half,__half,__half,8,{1,2}>
// instantiate: norm_backward<true,{false,true},__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,{8,1},0>
// instantiate: norm_backward<true,{false,true},__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,2}>
// instantiate: norm_backward<true,false,__half,{__half,float},float,{8,1},0>
// instantiate: norm_backward<true,false,__half,{__half,float},float,8,{1,2}>
// instantiate: norm_backward<true,false,__nv_bfloat16,{__nv_bfloat16,float},float,{8,1},0>
// instantiate: norm_backward<true,false,__nv_bfloat16,{__nv_bfloat16,float},float,8,{1,2}>
// instantiate: column_sum<{float,__half,__nv_bfloat16},{4,1}>
#include "norm_backward.cuh"
#include "norm_forward.cuh"
