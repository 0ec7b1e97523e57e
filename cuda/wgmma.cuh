// SPDX-License-Identifier: MIT
// Hopper's matrix products (wgmma, sm_90a): a warpgroup of four warps multiplies while it goes on with other
// work, B and, if it is not in registers, A read from shared memory.
//
// A tile in shared memory is cut into panels of 64 columns. A row of a panel has 128 bytes, whose eight 16-byte
// pieces are exchanged by the row's last three bits (the hardware's 128-byte swizzle), so that neither pieces of
// a row nor of a column meet in a bank. Panels begin at multiples of 1024 bytes.
//
// The layouts of descriptors and fragments are those of the PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions". A result's fragment is mma's (mma.cuh): warp w has rows 16 w to 16 w + 15, [N / 8][4] of them.
#pragma once
#include "mma.cuh"

// Where the 16-byte piece with a column, a multiple of 8, is in a tile of ROWS rows, in bytes.
template <int ROWS>
__device__ __forceinline__ unsigned piece_at(int row, int column) {
  return column / 64 * (ROWS * 128) + row * 128 + (column / 8 % 8 ^ row % 8) * 16;
}

// The lower word of a matrix's descriptor. The upper one is the same for all: groups of 8 rows 1024 bytes apart,
// 128-byte swizzle.
// A matrix in a tile of ROWS rows: its rows are the tile's, and products add over columns.
__device__ __forceinline__ unsigned by_rows(unsigned at) { return (at & 0x3ffff) >> 4; }
// Its transpose: its rows are the tile's columns, 64 or, over panels, more, and products add over the tile's rows.
template <int ROWS>
__device__ __forceinline__ unsigned by_columns(unsigned at) {
  return by_rows(at) | static_cast<unsigned>(ROWS * 128 >> 4) << 16;
}
// Steps of 16 in the sum, in descriptors: along a row by 32 bytes, down a column by 16 rows.
template <int ROWS>
__device__ __forceinline__ constexpr unsigned row_step(int k) {
  return (k / 4 * (ROWS * 128) + k % 4 * 32) >> 4;
}
__device__ __forceinline__ constexpr unsigned column_step(int k) { return k * 16 * 128 >> 4; }

// Before the first product that reads registers which other instructions wrote.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The compiler does not know that a product is still writing its result: no use of it may move before the wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(unsigned (&a)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[j][e])::"memory");
}
// Until at most LEFT groups of products are unfinished.
template <int LEFT>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices from fragments; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(unsigned to, const unsigned (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(m[0]), "r"(m[1]),
               "r"(m[2]), "r"(m[3])
               : "memory");
}

// What ordinary instructions and cp.async wrote to shared memory becomes visible to products, after a barrier.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier in shared memory, at which copies arrive: it is passed when those of `count` threads have, again and
// again, and a wait names the parity of the passage it waits for.
__device__ __forceinline__ void make_barrier(unsigned at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// Arrives when all of this thread's copies so far have.
__device__ __forceinline__ void arrive_with_copies(unsigned at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void wait_for(unsigned at, int parity) {
  asm volatile(
      "{ .reg .pred p; again%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again%=; }" ::"r"(at),
      "r"(parity)
      : "memory");
}
// A barrier of one group of warps among others; one that leaves is not held up by those that wait.
template <int THREADS>
__device__ __forceinline__ void wait_for_group(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS>
__device__ __forceinline__ void leave_group(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
// Registers per thread of a warpgroup from here on, within what the block has.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// D = A B, or D += A B if `add`, a constant, of 64 x 16 by 16 x N; COLUMNS: the matrix is one of `by_columns`.
// The first product of a sum only writes D, or D's registers would be kept for a value that nobody reads.
#define BARQ_FOUR(HOW, i) HOW(d[i][0]), HOW(d[i][1]), HOW(d[i][2]), HOW(d[i][3])
#define BARQ_FOURS(HOW, i) BARQ_FOUR(HOW, i), BARQ_FOUR(HOW, i + 1), BARQ_FOUR(HOW, i + 2), BARQ_FOUR(HOW, i + 3)
#define BARQ_D32(HOW) BARQ_FOURS(HOW, 0)
#define BARQ_D64(HOW) BARQ_FOURS(HOW, 0), BARQ_FOURS(HOW, 4)
#define BARQ_D128(HOW) BARQ_D64(HOW), BARQ_FOURS(HOW, 8), BARQ_FOURS(HOW, 12)
#define BARQ_D256(HOW) \
  BARQ_D128(HOW), BARQ_FOURS(HOW, 16), BARQ_FOURS(HOW, 20), BARQ_FOURS(HOW, 24), BARQ_FOURS(HOW, 28)
#define BARQ_NAMES32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define BARQ_NAMES64 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31}"
#define BARQ_NAMES128 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define BARQ_NAMES256 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104," \
  "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125," \
  "%126,%127}"
#define BARQ_DESCRIPTOR(NAME, LOW) "mov.b64 " NAME ", {" LOW ", 0x40000040}; "
#define BARQ_PRODUCT(N, TYPE, HOW, ADD, PREPARE, A, SETTINGS, ...)                                                    \
  asm volatile("{ .reg .pred p; .reg .b64 a, b; setp.ne.b32 p, " ADD ", 0; " PREPARE                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " BARQ_NAMES##N ", " A ", b, p, 1, " \
               "1, " SETTINGS "; }"                                                                                   \
               : BARQ_D##N(HOW) : __VA_ARGS__)
#define BARQ_SHARED32(TYPE, HOW, ADD)                                                                                 \
  BARQ_PRODUCT(32, TYPE, HOW, ADD, BARQ_DESCRIPTOR("a", "%16") BARQ_DESCRIPTOR("b", "%17"), "a", "%18, %19",          \
               "r"(a), "r"(b), "n"(A_COLUMNS), "n"(B_COLUMNS))
#define BARQ_SHARED64(TYPE, HOW, ADD)                                                                                 \
  BARQ_PRODUCT(64, TYPE, HOW, ADD, BARQ_DESCRIPTOR("a", "%32") BARQ_DESCRIPTOR("b", "%33"), "a", "%34, %35",          \
               "r"(a), "r"(b), "n"(A_COLUMNS), "n"(B_COLUMNS))
#define BARQ_REGISTERS64(TYPE, HOW, ADD)                                                                              \
  BARQ_PRODUCT(64, TYPE, HOW, ADD, BARQ_DESCRIPTOR("b", "%36"), "{%32, %33, %34, %35}", "%37",                        \
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(B_COLUMNS))
#define BARQ_SHARED128(TYPE, HOW, ADD)                                                                                \
  BARQ_PRODUCT(128, TYPE, HOW, ADD, BARQ_DESCRIPTOR("a", "%64") BARQ_DESCRIPTOR("b", "%65"), "a", "%66, %67",         \
               "r"(a), "r"(b), "n"(A_COLUMNS), "n"(B_COLUMNS))
#define BARQ_REGISTERS128(TYPE, HOW, ADD)                                                                             \
  BARQ_PRODUCT(128, TYPE, HOW, ADD, BARQ_DESCRIPTOR("b", "%68"), "{%64, %65, %66, %67}", "%69",                       \
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(B_COLUMNS))
#define BARQ_SHARED256(TYPE, HOW, ADD)                                                                                \
  BARQ_PRODUCT(256, TYPE, HOW, ADD, BARQ_DESCRIPTOR("a", "%128") BARQ_DESCRIPTOR("b", "%129"), "a", "%130, %131",      \
               "r"(a), "r"(b), "n"(A_COLUMNS), "n"(B_COLUMNS))
#define BARQ_CHOOSE(PRODUCT)                                                                                          \
  if constexpr (kIsHalf<T>) {                                                                                         \
    if (add) PRODUCT("f16", "+f", "1"); else PRODUCT("f16", "=f", "0");                                               \
  } else {                                                                                                            \
    if (add) PRODUCT("bf16", "+f", "1"); else PRODUCT("bf16", "=f", "0");                                             \
  }

template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[4][4], unsigned a, unsigned b, bool add) {
  BARQ_CHOOSE(BARQ_SHARED32)
}
template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[8][4], unsigned a, unsigned b, bool add) {
  BARQ_CHOOSE(BARQ_SHARED64)
}
template <typename T, bool B_COLUMNS>
__device__ __forceinline__ void multiply_registers(float (&d)[8][4], const unsigned (&a)[4], unsigned b, bool add) {
  BARQ_CHOOSE(BARQ_REGISTERS64)
}
template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[16][4], unsigned a, unsigned b, bool add) {
  BARQ_CHOOSE(BARQ_SHARED128)
}
template <typename T, bool B_COLUMNS>
__device__ __forceinline__ void multiply_registers(float (&d)[16][4], const unsigned (&a)[4], unsigned b, bool add) {
  BARQ_CHOOSE(BARQ_REGISTERS128)
}
template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[32][4], unsigned a, unsigned b, bool add) {
  BARQ_CHOOSE(BARQ_SHARED256)
}
