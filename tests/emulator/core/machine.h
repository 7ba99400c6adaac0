// What the emulator's parts share: numbers, instructions, and the state of a launch, a block (Triton's program) and a
// warp. Registers hold 64 bits a lane, whatever type an instruction sees in them.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using Half = _Float16;

constexpr int kLanes = 32, kMostWarps = 32;
constexpr u32 kAllLanes = ~0u;

template <class To, class From>
To bits(From value) {  // reinterpreted; a shorter result is cut, a longer one filled with zeros
  To result{};
  std::memcpy(&result, &value, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return result;
}

struct Bfloat {
  u16 raw;
  Bfloat() = default;
  explicit Bfloat(float value) {
    const u32 b = bits<u32>(value);
    raw = value != value ? 0x7fff : static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  operator float() const { return bits<float>(u32{raw} << 16); }
};

template <class T>
struct Pair {
  T low, high;
};

inline bool has(u32 lanes, int lane) { return lanes >> lane & 1; }

template <class F>
void each(u32 lanes, F f) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      if (has(lanes, lane)) f(lane);
  }
}

// How an instruction moves the program counter. kConverge runs once all lanes it names have come; kWait is tried again
// until it holds; kTrap ends the launch.
enum Control : s32 { kNext, kBranch, kExit, kConverge, kBarrier, kWait, kTrap };
enum Space : s32 { kGlobal, kShared, kParam, kLocal, kGeneric };

struct Instruction {
  s64 immediate;
  s32 operation;           // index into operations()
  s32 control;             // Control
  s32 predicate, negated;  // register, -1: none
  s32 operands[6];         // registers, -1: none
  s32 modifiers[8];        // as encode.py writes them, said at each operation
  s32 list;                // where its vector operands begin in Kernel::lists
  s32 target;              // of a branch
  s32 line;                // of the PTX text
};

struct Kernel {
  std::vector<Instruction> code;
  std::vector<s32> lists;
  int registers;
  std::vector<std::pair<s32, u64>> constants;  // register, value
  std::vector<std::pair<s32, s32>> specials;   // register, which of ptx.py's SPECIAL
  u32 static_shared, local_bytes, registers_a_thread;
};

// One name for each count, which Python reads too.
#define EMULATOR_COUNTERS(X)                                                                                       \
  X(warp_instructions) X(thread_instructions) X(load_requests) X(load_sectors) X(load_bytes) X(store_requests)     \
  X(store_sectors) X(store_bytes) X(copy_requests) X(copy_sectors) X(copy_bytes) X(bulk_requests) X(bulk_bytes)    \
  X(shared_load_requests) X(shared_load_wavefronts) X(shared_load_ideal) X(shared_store_requests)                  \
  X(shared_store_wavefronts) X(shared_store_ideal) X(ldmatrix_wavefronts) X(ldmatrix_ideal) X(matrix_instructions) \
  X(wgmma_instructions) X(matrix_flops) X(barriers) X(distinct_read_bytes) X(distinct_written_bytes)

struct Counters {
#define EMULATOR_FIELD(name) u64 name;
  EMULATOR_COUNTERS(EMULATOR_FIELD)
#undef EMULATOR_FIELD
};

// What every agent (a warp, or the unit of bulk copies, the last one) was seen to have done: a vector clock.
struct Clock {
  u32 seen[kMostWarps + 1] = {};
  void join(const Clock& other) {
    for (int a = 0; a <= kMostWarps; ++a) seen[a] = seen[a] > other.seen[a] ? seen[a] : other.seen[a];
  }
};

// What passes from one agent to another at a barrier. `fenced`: what it did before a fence.proxy.async.
struct Knowledge {
  Clock done, fenced;
  void join(const Knowledge& other) {
    done.join(other.done);
    fenced.join(other.fenced);
  }
};

struct Range {  // a tensor's storage
  u64 low, high;
  std::string name;
  std::vector<u64> writer;          // a byte: block + 1, and above 32 bits that block's time; 0: nobody
  std::vector<bool> read, written;  // a sector of 32 bytes
};

struct Mbarrier {
  int count, pending;
  s64 bytes;
  u32 phase;
  Knowledge arriving, complete;
};

struct CopyAsync {  // cp.async of a warp
  const Instruction* instruction;
  u32 lanes, size;
  u32 to[kLanes], bytes[kLanes];
  u64 from[kLanes];
  int group;
};

struct Wgmma {
  const Instruction* instruction;
  int group;
  u64 a, b;  // descriptors
  bool accumulate;
  u32 fragment[4][kLanes];  // of A, where it lies in registers, as it was at first
};

struct BulkCopy {
  const Instruction* instruction;
  u64 map;
  s32 at[5];
  u32 to, mbarrier;
  Knowledge issuer;
  u32 asked_by = 0;  // warps
};

struct Block;

struct Warp {
  Block* block;
  int id;
  std::vector<u64> registers;
  std::vector<u8> local;
  u32 pc[kLanes];  // while lanes are apart
  u32 common_pc;   // while they are together
  bool apart;
  u32 alive, held;        // held: lanes that wait for others of their warp
  bool waiting, yielded;  // at a barrier of the block; for an mbarrier or registers
  u32 register_limit;
  Knowledge knows;
  std::deque<CopyAsync> copies;
  std::deque<Wgmma> products;
  int copy_group, product_group;

  u64* reg(s32 r) { return registers.data() + size_t(r) * kLanes; }
  u32 now() const { return knows.done.seen[id]; }
  void pass_on(Knowledge& to) {  // all done so far; what follows is later
    to.join(knows);
    ++knows.done.seen[id];
  }
};

struct Barrier {
  u32 arrived = 0, expected = 0;  // threads; 0 expected: all of the block
  std::vector<int> waiting;
  Knowledge arriving;
};

struct Shadow {            // of shared memory, a byte each
  std::vector<u32> write;  // time << 8 | by the generic proxy << 7 | agent + 1; 0: never written
  std::vector<u32> read;   // [warp][byte]: when it last read
  std::vector<u16> busy;   // products issued and not waited for that read it
};

struct Launch {
  Kernel* kernel;
  u8* parameters;
  u32 parameter_bytes;
  std::vector<Range> ranges;
  u32 grid[3], threads, shared_bytes;
  u64 seed;
  bool late, count, check;  // asynchronous operations complete late; counters; races
  u64 limit;                // warp instructions
  size_t last_range = 0;
  Counters counters{};
  std::vector<u64> executed;  // a warp instruction of the kernel
  std::vector<std::string> errors;
  u64 error_count = 0;
  bool stopped = false;
  std::map<u64, std::unordered_map<u32, u32>> released;  // by address: blocks and the time up to which it is seen

  // The first messages are kept; " [line n]" of the PTX is appended where an instruction is given.
  [[gnu::format(printf, 3, 4)]] void error(const Instruction* at, const char* format, ...);
};

struct Block {
  Launch* launch;
  u32 at[3], id;
  std::vector<u8> shared;
  Shadow shadow;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::map<u32, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk;
  std::vector<u64> fenced_maps;  // tensor maps in global memory that may be used
  u32 bulk_time = 0, time = 1;   // of the unit of bulk copies; of this block, for others
  s64 free_registers = 0;
  std::unordered_map<u32, u32> visible;  // what other blocks released to this one
  std::mt19937_64 random;
};

using Operation = void (*)(Warp&, const Instruction&, u32 lanes);
using Operations = std::map<std::string, Operation>;

// Each fills its part of the table.
void add_arithmetic(Operations&);
void add_conversions(Operations&);
void add_exchanges(Operations&);  // between lanes
void add_memory(Operations&);
void add_matrices(Operations&);
void add_asynchronous(Operations&);

// Memory, checked: null where an access would leave its tensor.
u8* global_bytes(Warp&, const Instruction&, u64 address, u32 size, bool write, int lane, bool atomic = false);
const u8* shared_read(Warp&, const Instruction&, u32 address, u32 size, int lane, bool async_proxy = false);
void shared_write(Warp&, const Instruction&, u32 address, const u8* data, u32 size, int lane);
void shared_bulk_write(Block&, const BulkCopy&, u32 address, const u8* data, u32 size, u32 time);

bool try_wait(Warp&, const Instruction&, u32 lanes);  // whether every lane's phase is complete, or registers are there

}  // namespace emulator
