// Runs a launch: blocks one after the other in a seeded order, their warps in turns of seeded length, and in a warp the
// lanes that are furthest behind. The interface to Python stands at the end.
#include <algorithm>
#include <memory>

#include "machine.h"

namespace emulator {
namespace {

const Operations& operations() {
  static const Operations table = [] {
    Operations t;
    add_arithmetic(t), add_conversions(t), add_exchanges(t), add_memory(t), add_matrices(t), add_asynchronous(t);
    return t;
  }();
  return table;
}

const std::vector<Operation>& by_index() {
  static const std::vector<Operation> table = [] {
    std::vector<Operation> t;
    for (const auto& [name, operation] : operations()) t.push_back(operation);
    return t;
  }();
  return table;
}

u32 predicated(Warp& w, const Instruction& i, u32 lanes) {
  if (i.predicate < 0) return lanes;
  const u64* p = w.reg(i.predicate);
  u32 found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= u32(p[lane] != 0) << lane;
  return lanes & (i.negated ? ~found : found);
}

// Which lanes run next, and where: all, or those furthest behind of the ones that wait for nobody.
u32 choose(const Warp& w, u32& pc) {
  if (!w.apart) return pc = w.common_pc, w.alive;
  const u32 ready = w.alive & ~w.held;
  pc = ~0u;
  each(ready, [&](int lane) { pc = std::min(pc, w.pc[lane]); });
  u32 lanes = 0;
  each(ready, [&](int lane) { lanes |= u32(w.pc[lane] == pc) << lane; });
  return lanes;
}

void go_to(Warp& w, u32 lanes, u32 pc) {
  if (!w.apart) {
    w.common_pc = pc;
    return;
  }
  each(lanes, [&](int lane) { w.pc[lane] = pc; });
  if (!w.alive || (w.held & w.alive)) return;
  const u32 first = w.pc[__builtin_ctz(w.alive)];
  bool together = true;
  each(w.alive, [&](int lane) { together = together && w.pc[lane] == first; });
  if (together) w.apart = false, w.common_pc = first;
}

u32 lanes_at(const Warp& w, u32 pc, u32 lanes) {
  if (w.apart) each(w.alive, [&](int lane) { lanes |= u32(w.pc[lane] == pc) << lane; });
  return lanes;
}

void branch(Warp& w, const Instruction& i, u32 lanes, u32 taken, u32 pc) {
  if (taken == lanes) return go_to(w, lanes, i.target);
  if (!taken) return go_to(w, lanes, pc + 1);
  if (!w.apart) {
    w.apart = true;
    std::fill_n(w.pc, kLanes, pc);
  }
  each(lanes & ~taken, [&](int lane) { w.pc[lane] = pc + 1; });
  go_to(w, taken, i.target);
}

u32 living_threads(const Block& block) {
  u32 count = 0;
  for (const Warp& w : block.warps) count += w.alive ? kLanes : 0;
  return count;
}

void release_if_full(Block& block, Barrier& barrier) {
  if (barrier.arrived < (barrier.expected ? barrier.expected : living_threads(block))) return;
  for (const int id : barrier.waiting) {
    block.warps[id].waiting = false;
    block.warps[id].knows.join(barrier.arriving);
  }
  barrier = Barrier{};
  ++block.launch->counters.barriers;
}

void leave(Warp& w, u32 lanes, u32 left, u32 pc) {
  w.alive &= ~left, w.held &= w.alive;
  if (!w.alive) {
    for (Barrier& barrier : w.block->barriers)
      if (!barrier.waiting.empty() && !barrier.expected) release_if_full(*w.block, barrier);
  } else if (lanes & ~left) {
    go_to(w, lanes & ~left, pc + 1);
  }
}

// Operands: barrier, threads (-1: all); modifier: arrives without waiting. A warp counts once all its lanes have come.
void block_barrier(Warp& w, const Instruction& i, u32 lanes, u32 chosen, u32 pc) {
  if (chosen && chosen != lanes)
    w.block->launch->error(&i, "a barrier under a predicate on which the lanes of warp %d differ", w.id);
  go_to(w, lanes, pc + 1);
  if (!chosen) return;
  Barrier& barrier = w.block->barriers[w.reg(i.operands[0])[0] & 15];
  const u32 expected = i.operands[1] < 0 ? 0 : static_cast<u32>(w.reg(i.operands[1])[0]);
  if (barrier.arrived && barrier.expected != expected)
    w.block->launch->error(&i, "a barrier is met with %u threads and with %u", barrier.expected, expected);
  barrier.arrived += kLanes, barrier.expected = expected;
  w.pass_on(barrier.arriving);
  if (!i.modifiers[0]) barrier.waiting.push_back(w.id), w.waiting = true;
  release_if_full(*w.block, barrier);
}

// Whether a warp-wide instruction runs now; `lanes` become all that take part.
bool converged(Warp& w, const Instruction& i, u32& lanes, u32 pc) {
  const u32 all = i.control == kConverge && i.operands[4] >= 0
                      ? static_cast<u32>(w.reg(i.operands[4])[__builtin_ctz(lanes)])
                      : kAllLanes;
  const u32 came = lanes_at(w, pc, lanes);
  if ((all & w.alive) & ~came) {
    w.held |= lanes;
    return false;
  }
  w.held &= ~came;
  lanes = came;
  return true;
}

void run(Warp& w, int turns) {
  Launch& launch = *w.block->launch;
  const Kernel& kernel = *launch.kernel;
  w.yielded = false;
  while (turns-- > 0 && !launch.stopped && w.alive && !w.waiting && !w.yielded) {
    u32 pc, lanes = choose(w, pc);
    if (!lanes) {
      launch.error(nullptr, "deadlock: the lanes of warp %d wait for each other, block %u", w.id, w.block->id);
      launch.stopped = true;
      return;
    }
    const Instruction& i = kernel.code[pc];
    u32 chosen = predicated(w, i, lanes);
    ++launch.counters.warp_instructions, ++launch.executed[pc];
    launch.counters.thread_instructions += __builtin_popcount(chosen);
    if (launch.counters.warp_instructions > launch.limit) {
      launch.error(&i, "the limit of %llu instructions was reached", (unsigned long long)launch.limit);
      launch.stopped = true;
    }
    switch (i.control) {
      case kNext:
        if (chosen) by_index()[i.operation](w, i, chosen);
        go_to(w, lanes, pc + 1);
        break;
      case kBranch: branch(w, i, lanes, chosen, pc); break;
      case kExit: leave(w, lanes, chosen, pc); break;
      case kConverge:
        if (!converged(w, i, lanes, pc)) break;
        if ((chosen = predicated(w, i, lanes))) by_index()[i.operation](w, i, chosen);
        go_to(w, lanes, pc + 1);
        break;
      case kBarrier:
        if (converged(w, i, lanes, pc)) block_barrier(w, i, lanes, predicated(w, i, lanes), pc);
        break;
      case kWait: {  // an mbarrier's result is looked at by the program, which branches back itself
        const bool held = !chosen || try_wait(w, i, chosen);
        if (held || i.modifiers[0] == 0) go_to(w, lanes, pc + 1);
        w.yielded = !held;
        break;
      }
      case kTrap:
        if (chosen) launch.error(&i, "trap, block %u, warp %d", w.block->id, w.id), launch.stopped = true;
        go_to(w, lanes, pc + 1);
    }
  }
}

u64 special(const Block& block, s32 which, int warp, int lane) {
  const Launch& l = *block.launch;
  const u64 values[] = {u64(warp * kLanes + lane),
                        0,
                        0,
                        block.at[0],
                        block.at[1],
                        block.at[2],
                        l.threads,
                        1,
                        1,
                        l.grid[0],
                        l.grid[1],
                        l.grid[2],
                        u64(lane),
                        u64(warp),
                        0,
                        (1u << lane) - 1,
                        1u << lane};
  return values[which];
}

void prepare(Block& block) {
  Launch& launch = *block.launch;
  const Kernel& kernel = *launch.kernel;
  const size_t warps = (launch.threads + kLanes - 1) / kLanes, bytes = launch.shared_bytes + kernel.static_shared;
  block.shared.assign(bytes, 0xff);  // NaN in every type of floating point, as are registers
  if (launch.check) {
    block.shadow.write.assign(bytes, 0);
    block.shadow.read.assign(bytes * warps, 0);
    block.shadow.busy.assign(bytes, 0);
  }
  block.random.seed(launch.seed * 1000003 + block.id);
  block.warps.resize(warps);
  for (size_t id = 0; id < warps; ++id) {
    Warp& w = block.warps[id];
    w.block = &block, w.id = static_cast<int>(id);
    w.registers.assign(size_t(kernel.registers) * kLanes, ~0ull);
    w.local.assign(size_t(kernel.local_bytes) * kLanes, 0xff);
    const u32 threads = launch.threads - static_cast<u32>(id) * kLanes;
    w.alive = threads >= kLanes ? kAllLanes : (1u << threads) - 1;
    w.register_limit = kernel.registers_a_thread;
    w.knows.done.seen[id] = 1;
    for (const auto& [r, value] : kernel.constants) std::fill_n(w.reg(r), kLanes, value);
    for (const auto& [r, which] : kernel.specials)
      for (int lane = 0; lane < kLanes; ++lane) w.reg(r)[lane] = special(block, which, w.id, lane);
  }
}

void run_block(Launch& launch, u32 id) {
  const u32* grid = launch.grid;
  auto block = std::make_unique<Block>();
  block->launch = &launch, block->id = id;
  block->at[0] = id % grid[0], block->at[1] = id / grid[0] % grid[1], block->at[2] = id / (grid[0] * grid[1]);
  prepare(*block);
  u64 in_vain = 0;
  while (!launch.stopped) {
    std::vector<Warp*> ready;
    bool living = false;
    for (Warp& w : block->warps) {
      living = living || w.alive;
      if (w.alive && !w.waiting) ready.push_back(&w);
    }
    if (!living) break;
    if (ready.empty()) {
      launch.error(nullptr, "deadlock: every warp of block %u waits at a barrier", id);
      launch.stopped = true;
      break;
    }
    const u64 before = launch.counters.warp_instructions;
    Warp& w = *ready[block->random() % ready.size()];
    const int turns = block->random() % 4 == 0 ? 1 + block->random() % 8 : 20 + block->random() % 400;
    run(w, turns);
    in_vain = launch.counters.warp_instructions - before < 16 ? in_vain + w.yielded : 0;
    if (in_vain > 2000) {
      u32 pc = 0;
      choose(w, pc);
      launch.error(&launch.kernel->code[pc], "deadlock: block %u waits for an mbarrier or for registers", id);
      launch.stopped = true;
    }
  }
  if (launch.stopped) return;
  for (const Warp& w : block->warps) {
    if (!w.copies.empty()) launch.error(w.copies.front().instruction, "cp.async is not waited for");
    if (!w.products.empty()) launch.error(w.products.front().instruction, "wgmma is not waited for");
  }
  if (!block->bulk.empty()) launch.error(block->bulk.front().instruction, "a bulk copy is not waited for");
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

const char* emulator_counters() {
#define EMULATOR_NAME(name) #name " "
  return EMULATOR_COUNTERS(EMULATOR_NAME);
#undef EMULATOR_NAME
}

s32 emulator_operation(const char* name) {  // its index, -1: not known
  const auto found = operations().find(name);
  return found == operations().end() ? -1 : static_cast<s32>(std::distance(operations().begin(), found));
}

void* emulator_kernel(const Instruction* code, s32 count, const s32* lists, s32 list_count, s32 registers,
                      const s32* constants, const u64* values, s32 constant_count, const s32* specials,
                      const s32* which, s32 special_count, u32 static_shared, u32 local_bytes, u32 registers_a_thread) {
  auto* kernel = new Kernel{{code, code + count}, {lists, lists + list_count}, registers, {}, {}, static_shared,
                            local_bytes,          registers_a_thread};
  for (s32 k = 0; k < constant_count; ++k) kernel->constants.push_back({constants[k], values[k]});
  for (s32 k = 0; k < special_count; ++k) kernel->specials.push_back({specials[k], which[k]});
  return kernel;
}

struct LaunchArguments {
  void* kernel;
  u8* parameters;
  const u64 *low, *high;  // of the tensors' storages
  const char* const* names;
  const u32* blocks;  // which to run
  u64* counters;
  u64* executed;
  char* errors;
  u64 seed, limit;
  u32 parameter_bytes, range_count, block_count, grid[3], threads, shared_bytes, error_bytes;
  u8 late, count, check;
};

u64 emulator_launch(const LaunchArguments* a) {  // how many errors; their text in `errors`
  Launch launch;
  launch.kernel = static_cast<Kernel*>(a->kernel);
  launch.parameters = a->parameters, launch.parameter_bytes = a->parameter_bytes;
  std::copy_n(a->grid, 3, launch.grid);
  launch.threads = a->threads, launch.shared_bytes = a->shared_bytes, launch.seed = a->seed, launch.limit = a->limit;
  launch.late = a->late, launch.count = a->count, launch.check = a->check;
  launch.executed.assign(launch.kernel->code.size(), 0);
  for (u32 k = 0; k < a->range_count; ++k) {
    Range range{a->low[k], a->high[k], a->names[k], {}, {}, {}};
    if (launch.check) range.writer.assign(range.high - range.low, 0);
    if (launch.count) range.read.assign((range.high - range.low) / 32 + 1, false), range.written = range.read;
    launch.ranges.push_back(std::move(range));
  }
  std::vector<u32> order(a->blocks, a->blocks + a->block_count);
  std::mt19937_64 random(launch.seed);
  if (launch.seed) std::shuffle(order.begin(), order.end(), random);
  for (const u32 id : order) {
    if (launch.stopped) break;
    run_block(launch, id);
  }
  for (const Range& range : launch.ranges) {
    launch.counters.distinct_read_bytes += 32 * std::count(range.read.begin(), range.read.end(), true);
    launch.counters.distinct_written_bytes += 32 * std::count(range.written.begin(), range.written.end(), true);
  }
  std::memcpy(a->counters, &launch.counters, sizeof launch.counters);
  std::copy(launch.executed.begin(), launch.executed.end(), a->executed);
  std::string text;
  for (const std::string& e : launch.errors) text += e + "\n";
  text.copy(a->errors, a->error_bytes - 1);
  a->errors[std::min<size_t>(text.size(), a->error_bytes - 1)] = 0;
  return launch.error_count;
}

}  // extern "C"
