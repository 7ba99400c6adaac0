// Tensor cores: mma.sync of a warp, and wgmma, of which each warp of a group does its own 16 rows. Products are exact
// and sums in float64, rounded to float32 once an instruction. Layouts: PTX ISA, "Warp-level Matrix Instructions" and
// "Asynchronous Warpgroup Level Matrix Instructions".
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

enum Element { kBf16, kF16, kTf32 };

float element(u32 raw, s32 type) {
  if (type == kTf32) return bits<float>(raw & 0xffffe000u);
  return type == kF16 ? float{bits<Half>(static_cast<u16>(raw))} : float{bits<Bfloat>(static_cast<u16>(raw))};
}
int element_bytes(s32 type) { return type == kTf32 ? 4 : 2; }

// Calls f(row, column, raw) for what a lane's registers of a fragment hold: register r covers row `lane / 4` (8 lower
// where r is odd, if rows_first), columns from 4 bytes times `lane % 4`, 16 bytes further with every (second) register.
template <class F>
void fragment(Warp& w, const s32* registers, int count, bool rows_first, s32 type, F f) {
  const int size = element_bytes(type), in_register = 4 / size;
  for (int r = 0; r < count; ++r) {
    const u64* value = w.reg(registers[r]);
    const int row = rows_first ? 8 * (r & 1) : 0, column = (rows_first ? r >> 1 : r) * 16 / size;
    for (int lane = 0; lane < kLanes; ++lane)
      for (int k = 0; k < in_register; ++k)
        f(row + (lane >> 2), column + (lane & 3) * in_register + k, static_cast<u32>(value[lane] >> 16 * k));
  }
}

// Calls f(row, column, value of float32 in a register) for a lane's part of a result.
template <class F>
void accumulators(Warp& w, const s32* registers, int count, F f) {
  for (int r = 0; r < count; ++r) {
    u64* value = w.reg(registers[r]);
    for (int lane = 0; lane < kLanes; ++lane)
      f((lane >> 2) + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * (lane & 3) + (r & 1), value[lane]);
  }
}

template <int columns>
void multiply(double (&c)[16][columns], const float (&a)[16][16], const float (&b)[16][columns], int n, int k) {
  for (int row = 0; row < 16; ++row)
    for (int inner = 0; inner < k; ++inner) {
      const double x = a[row][inner];
      for (int column = 0; column < n; ++column) c[row][column] += x * double{b[inner][column]};
    }
}

// Modifiers: type, K. List: 4 registers of D, then A, B, C.
void mma(Warp& w, const Instruction& i, u32) {
  const s32 type = i.modifiers[0];
  const int k = i.modifiers[1], of_b = k * element_bytes(type) / 16, of_a = 2 * of_b;
  const s32 *d = &w.block->launch->kernel->lists[i.list], *a = d + 4, *b = a + of_a, *c = b + of_b;
  float left[16][16], right[16][8];
  double sum[16][8];
  fragment(w, a, of_a, true, type, [&](int row, int column, u32 raw) { left[row][column] = element(raw, type); });
  fragment(w, b, of_b, false, type, [&](int row, int column, u32 raw) { right[column][row] = element(raw, type); });
  accumulators(w, c, 4, [&](int row, int column, u64 value) { sum[row][column] = bits<float>(value); });
  multiply(sum, left, right, 8, k);
  accumulators(w, d, 4,
               [&](int row, int column, u64& value) { value = bits<u64>(static_cast<float>(sum[row][column])); });
  ++w.block->launch->counters.matrix_instructions;
  w.block->launch->counters.matrix_flops += 2 * 16 * 8 * k;
}

u32 swizzled(u32 address, int mode) {  // mode: 1, 2 and 3 for rows of 128, 64 and 32 bytes
  return mode == 0 ? address : address ^ (address >> 3 & (mode == 1 ? 0x70 : mode == 2 ? 0x30 : 0x10));
}

// Calls f(address, mn, k) for every 16 bytes of an operand in shared memory, `rows` from `first` on, K wide. 16 bytes
// hold neighbours along k, or along mn where the operand is transposed.
template <class F>
void operand(u64 descriptor, int first, int rows, int k_size, bool transposed, int size, F f) {
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
            stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62 & 3, unit = 16 / size;
  const int width = mode == 0 ? 16 : 256 >> mode;
  for (int mn = first; mn < first + rows; mn += transposed ? unit : 1)
    for (int k = 0; k < k_size; k += transposed ? 1 : unit) {
      u32 offset;
      if (!transposed) {
        offset = mn / 8 * stride + mn % 8 * width + (mode == 0 ? k / unit * leading : k * size);
      } else {
        const int across = width / size;
        offset = mn / across * (mode == 0 ? stride : leading) + k / 8 * (mode == 0 ? leading : stride) + k % 8 * width +
                 mn % across * size;
      }
      f(swizzled(start + offset, mode), mn, k);
    }
}

// Operands: descriptor of A (-1: in registers), of B, whether to accumulate. Modifiers: N, A in registers, type,
// A transposed, B transposed, signs of A and B. List: N / 2 registers of D, then 4 of A.
struct Shape {
  int n, k, size;
  bool a_in_registers;
  explicit Shape(const Instruction& i)
      : n(i.modifiers[0]),
        k(32 / element_bytes(i.modifiers[2])),
        size(element_bytes(i.modifiers[2])),
        a_in_registers(i.modifiers[1]) {}
};

template <class F>
void shared_operands(const Warp& w, const Wgmma& p, F f) {  // f(address, mn, k, whether of A)
  const Instruction& i = *p.instruction;
  const Shape s(i);
  const int first = (w.id & 3) * 16;
  if (!s.a_in_registers)
    operand(p.a, first, 16, s.k, i.modifiers[3], s.size, [&](u32 at, int mn, int k) { f(at, mn - first, k, true); });
  operand(p.b, 0, s.n, s.k, i.modifiers[4], s.size, [&](u32 at, int mn, int k) { f(at, mn, k, false); });
}

// Its operands in shared memory are in use, or no longer.
void mark_product(Warp& w, const Wgmma& p, int change) {
  if (!w.block->launch->check) return;
  std::vector<u16>& busy = w.block->shadow.busy;
  shared_operands(w, p, [&](u32 at, int, int, bool) {
    if (u64{at} + 16 > busy.size()) return;  // reading it says so
    for (u32 byte = at; byte < at + 16; ++byte) busy[byte] += change;
  });
}

void run_product(Warp& w, const Wgmma& p) {
  const Instruction& i = *p.instruction;
  const Shape s(i);
  const s32* d = &w.block->launch->kernel->lists[i.list];
  static float left[16][16], right[16][256];
  static double sum[16][256];
  if (s.a_in_registers)
    fragment(w, d + s.n / 2, 4, true, i.modifiers[2],
             [&](int row, int column, u32 raw) { left[row][column] = element(raw, i.modifiers[2]); });
  shared_operands(w, p, [&](u32 at, int mn, int k, bool of_a) {
    const u8* bytes = shared_read(w, i, at, 16, 0, true);
    const bool along_mn = i.modifiers[of_a ? 3 : 4];
    for (int e = 0; e < 16 / s.size; ++e) {
      u32 raw = ~0u;
      if (bytes) raw = 0, std::memcpy(&raw, bytes + e * s.size, s.size);
      const float value = element(raw, i.modifiers[2]);
      const int row = mn + (along_mn ? e : 0), column = k + (along_mn ? 0 : e);
      (of_a ? left[row][column] : right[column][row]) = value;
    }
  });
  if (i.modifiers[5] * i.modifiers[6] < 0)
    for (auto& row : left)
      for (float& x : row) x = -x;
  accumulators(w, d, s.n / 2,
               [&](int row, int column, u64 value) { sum[row][column] = p.accumulate ? bits<float>(value) : 0.0f; });
  multiply(sum, left, right, s.n, s.k);
  accumulators(w, d, s.n / 2,
               [&](int row, int column, u64& value) { value = bits<u64>(static_cast<float>(sum[row][column])); });
  ++w.block->launch->counters.wgmma_instructions;
  w.block->launch->counters.matrix_flops += u64{2} * 16 * s.n * s.k;
}

const s32* fragment_of_a(const Warp& w, const Instruction& i) {
  return &w.block->launch->kernel->lists[i.list] + i.modifiers[0] / 2;
}

void wgmma(Warp& w, const Instruction& i, u32) {
  const bool in_registers = i.modifiers[1];
  Wgmma product{&i,
                w.product_group,
                in_registers ? 0 : w.reg(i.operands[0])[0],
                w.reg(i.operands[1])[0],
                w.reg(i.operands[2])[0] != 0,
                {}};
  for (int r = 0; r < 4 && in_registers; ++r) std::copy_n(w.reg(fragment_of_a(w, i)[r]), kLanes, product.fragment[r]);
  mark_product(w, product, 1);
  if (!w.block->launch->late) run_product(w, product);
  w.products.push_back(product);
}

void check_fragment(Warp& w, const Wgmma& product) {
  const s32* registers = fragment_of_a(w, *product.instruction);
  for (int r = 0; r < 4; ++r)
    for (int lane = 0; lane < kLanes; ++lane)
      if (static_cast<u32>(w.reg(registers[r])[lane]) != product.fragment[r][lane])
        return w.block->launch->error(product.instruction,
                                      "race: registers of A are written while wgmma still reads them, warp %d", w.id);
}

void wait_products(Warp& w, const Instruction& i, u32) {  // modifier: groups that may stay under way
  for (; !w.products.empty() && w.products.front().group < w.product_group - i.modifiers[0]; w.products.pop_front()) {
    const Wgmma& product = w.products.front();
    if (w.block->launch->late) run_product(w, product);
    mark_product(w, product, -1);
    if (product.instruction->modifiers[1]) check_fragment(w, product);
  }
}

}  // namespace

void add_matrices(Operations& table) {
  table["mma"] = mma, table["wgmma"] = wgmma, table["wgmma.wait"] = wait_products;
  table["wgmma.commit"] = [](Warp& w, const Instruction&, u32) { ++w.product_group; };
}

}  // namespace emulator
