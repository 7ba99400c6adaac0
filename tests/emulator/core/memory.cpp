// Memory, and what is checked on every access: bounds, alignment, bytes that were never written, races.
//
// Shared memory: an access races with an earlier one of another warp (or of the unit of bulk copies) unless barriers
// ordered them, by vector clocks; lanes of one warp count as ordered. Global memory: a byte that one block wrote may be
// touched by another only after a release and an acquire of it.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "machine.h"

namespace emulator {

void Launch::error(const Instruction* at, const char* format, ...) {
  if (++error_count > 20) return;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  errors.push_back(at ? std::string(text) + " [line " + std::to_string(at->line) + "]" : text);
}

namespace {

constexpr u64 kSharedWindow = 0x00f0000000000000ull;    // where generic addresses of shared memory begin
constexpr u32 kGenericProxy = 128, kManyWriters = 127;  // of Shadow::write
constexpr u32 kSector = 32;

Range* range_of(Launch& launch, u64 address) {
  const auto inside = [&](const Range& r) { return address >= r.low && address < r.high; };
  if (launch.last_range < launch.ranges.size() && inside(launch.ranges[launch.last_range]))
    return &launch.ranges[launch.last_range];
  for (size_t k = 0; k < launch.ranges.size(); ++k)
    if (inside(launch.ranges[k])) return &launch.ranges[launch.last_range = k];
  return nullptr;
}

void check_blocks(Block& block, const Instruction& i, Range& range, u64 offset, u32 size, bool write, bool atomic) {
  const u64 mine = u64{block.time} << 32 | (block.id + 1);
  u64 last = 0;
  for (u64 byte = offset; byte < offset + size; ++byte) {
    u64& writer = range.writer[byte];
    const u32 other = static_cast<u32>(writer);
    if (writer != last && other && other != block.id + 1 && !atomic) {
      const auto seen = block.visible.find(other - 1);
      if (seen == block.visible.end() || writer >> 32 > seen->second)
        block.launch->error(&i, "race: block %u %s what block %u wrote, byte %llu of %s", block.id,
                            write ? "overwrites" : "reads", other - 1, (unsigned long long)byte, range.name.c_str());
    }
    last = writer;
    if (write) writer = atomic ? 0 : mine;
  }
}

u8* shared_at(Warp& w, const Instruction& i, u32 address, u32 size, bool write, int lane) {
  Block& block = *w.block;
  const char* what = write ? "store" : "load";
  if (address % size)
    block.launch->error(&i, "misaligned shared %s of %u bytes at %u, lane %d", what, size, address, lane);
  if (u64{address} + size <= block.shared.size()) return &block.shared[address];
  block.launch->error(&i, "shared %s out of bounds: %u bytes at %u of %zu, block %u, warp %d, lane %d", what, size,
                      address, block.shared.size(), block.id, w.id, lane);
  return nullptr;
}

// What an agent must have seen before it touches these bytes.
void check_shared(Block& block, const Instruction& i, u32 address, u32 size, int agent, const Clock& seen, bool write) {
  Shadow& shadow = block.shadow;
  u32 last = 0;
  for (u32 byte = address; byte < address + size; ++byte) {
    const u32 word = shadow.write[byte], writer = word & kManyWriters;
    if (word == last) continue;
    last = word;
    const bool own = int(writer) == agent + 1 && agent < kMostWarps;  // bulk copies are not in order among themselves
    if (writer && writer != kManyWriters && !own && word >> 8 > seen.seen[writer - 1]) {
      block.launch->error(&i,
                          "race: agent %d %s shared byte %u, which agent %u wrote without a barrier between, block %u",
                          agent, write ? "overwrites" : "reads", byte, writer - 1, block.id);
      return;
    }
  }
  if (!write) return;
  for (size_t other = 0; other < block.warps.size(); ++other) {
    if (int(other) == agent) continue;
    const u32* read = &shadow.read[other * block.shared.size() + address];
    u32 latest = 0;
    for (u32 k = 0; k < size; ++k) latest = std::max(latest, read[k]);
    if (latest > seen.seen[other])
      block.launch->error(
          &i, "race: agent %d overwrites shared byte %u, which warp %zu read without a barrier between, block %u",
          agent, address, other, block.id);
  }
  for (u32 k = 0; k < size; ++k)
    if (shadow.busy[address + k]) {
      block.launch->error(&i, "race: agent %d overwrites shared byte %u while a wgmma still reads it, block %u", agent,
                          address + k, block.id);
      return;
    }
}

void count_global(const u64* addresses, u32 lanes, u32 size, u64& requests, u64& sectors, u64& bytes) {
  u64 touched[kLanes * 2];
  int count = 0;
  each(lanes, [&](int lane) {
    for (u64 s = addresses[lane] / kSector; s <= (addresses[lane] + size - 1) / kSector; ++s) touched[count++] = s;
  });
  std::sort(touched, touched + count);
  ++requests;
  sectors += std::unique(touched, touched + count) - touched;
  bytes += u64(__builtin_popcount(lanes)) * size;
}

// Wavefronts of a request: lanes are served 32, 16 or 8 at a time by their size, and each bank gives a word at a time.
void count_shared(const u32* addresses, u32 lanes, u32 size, u64& wavefronts, u64& ideal) {
  const int group = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += group) {
    u32 words[32][8];
    u32 held[32] = {}, most = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if (!has(lanes, lane)) continue;
      for (u32 word = addresses[lane] / 4; word <= (addresses[lane] + size - 1) / 4; ++word) {
        const u32 bank = word % 32;
        const u32* end = words[bank] + std::min<u32>(held[bank], 8);
        if (std::find(words[bank], const_cast<u32*>(end), word) != end) continue;
        if (held[bank] < 8) words[bank][held[bank]] = word;
        most = std::max(most, ++held[bank]);
      }
    }
    wavefronts += most, ideal += most > 0;
  }
}

u8* local_at(Warp& w, const Instruction& i, u64 address, u32 size, int lane) {
  const u64 each_lane = w.local.size() / kLanes;
  if (address + size <= each_lane) return w.local.data() + lane * each_lane + address;
  w.block->launch->error(&i, "local access out of bounds: %u bytes at %llu", size, (unsigned long long)address);
  return nullptr;
}

// The space that a generic address lies in; the address becomes one of that space.
s32 space_of(const Warp& w, u64& address) {
  const Launch& launch = *w.block->launch;
  const u64 parameters = reinterpret_cast<u64>(launch.parameters), local = reinterpret_cast<u64>(w.local.data());
  if (address >= parameters && address < parameters + launch.parameter_bytes) return address -= parameters, kParam;
  if (address - kSharedWindow < u64{1} << 32) return address -= kSharedWindow, kShared;
  if (!w.local.empty() && address >= local && address < local + w.local.size())
    return address = (address - local) % (w.local.size() / kLanes), kLocal;
  return kGlobal;
}

// ld and st. Operand: address; immediate: offset; modifiers: space, bytes, elements, signed; list: values
template <bool write>
void access(Warp& w, const Instruction& i, u32 lanes) {
  Launch& launch = *w.block->launch;
  const s32* values = &launch.kernel->lists[i.list];
  const u32 element = i.modifiers[1], count = i.modifiers[2], size = element * count;
  const u64* address = w.reg(i.operands[0]);
  u64 global[kLanes];
  u32 shared[kLanes], in_global = 0, in_shared = 0;
  u8 data[16];
  each(lanes, [&](int lane) {
    u64 at = address[lane] + i.immediate;
    s32 space = i.modifiers[0];
    if (space == kGeneric) space = space_of(w, at);
    if (write)
      for (u32 k = 0; k < count; ++k) std::memcpy(data + k * element, &w.reg(values[k])[lane], element);
    const u8* found = nullptr;
    if (space == kShared) {
      in_shared |= 1u << lane, shared[lane] = static_cast<u32>(at);
      if (write) return shared_write(w, i, static_cast<u32>(at), data, size, lane);
      found = shared_read(w, i, static_cast<u32>(at), size, lane);
    } else {
      u8* bytes = space == kParam ? launch.parameters + at : space == kLocal ? local_at(w, i, at, size, lane) : nullptr;
      if (space == kGlobal) {
        in_global |= 1u << lane, global[lane] = at;
        bytes = global_bytes(w, i, at, size, write, lane);
      }
      if (write && bytes) std::memcpy(bytes, data, size);
      found = bytes;
    }
    if (write) return;
    std::memset(data, 0xff, size);
    if (found) std::memcpy(data, found, size);
    for (u32 k = 0; k < count; ++k) {
      if (values[k] < 0) continue;
      u64 value = 0;
      std::memcpy(&value, data + k * element, element);
      if (i.modifiers[3])
        value = element == 1 ? s64{static_cast<s8>(value)} : element == 2 ? s64{static_cast<s16>(value)} : value;
      w.reg(values[k])[lane] = value;
    }
  });
  if (!launch.count) return;
  Counters& n = launch.counters;
  if (in_global && write) count_global(global, in_global, size, n.store_requests, n.store_sectors, n.store_bytes);
  if (in_global && !write) count_global(global, in_global, size, n.load_requests, n.load_sectors, n.load_bytes);
  if (!in_shared) return;
  ++(write ? n.shared_store_requests : n.shared_load_requests);
  count_shared(shared, in_shared, size, write ? n.shared_store_wavefronts : n.shared_load_wavefronts,
               write ? n.shared_store_ideal : n.shared_load_ideal);
}

u64 combined(s32 operation, u64 old, u64 value, u64 swapped, s32 type_bytes, bool is_float, bool is_signed) {
  const auto number = [&](u64 x) { return is_signed ? type_bytes == 4 ? s64{static_cast<s32>(x)} : s64(x) : s64(x); };
  switch (operation) {
    case 0:
      if (!is_float) return old + value;
      if (type_bytes == 4) return bits<u64>(bits<float>(old) + bits<float>(value));
      return bits<u64>(bits<double>(old) + bits<double>(value));
    case 1: return is_signed ? (number(old) < number(value) ? old : value) : std::min(old, value);
    case 2: return is_signed ? (number(old) > number(value) ? old : value) : std::max(old, value);
    case 3: return value;                         // exch
    case 4: return old == value ? swapped : old;  // cas
    case 5: return old & value;
    case 6: return old | value;
    default: return old ^ value;
  }
}

// atom and red. Operands: result (-1: red), address, value, what cas puts. Modifiers: space, bytes, operation, float,
// signed, and 1 acquire + 2 release.
void atomic(Warp& w, const Instruction& i, u32 lanes) {
  Block& block = *w.block;
  Launch& launch = *block.launch;
  const u32 size = i.modifiers[1];
  each(lanes, [&](int lane) {
    u64 address = w.reg(i.operands[1])[lane] + i.immediate;
    s32 space = i.modifiers[0];
    if (space == kGeneric) space = space_of(w, address);
    u8 in_shared[8];
    u8* at = in_shared;
    if (space == kShared) {
      const u8* found = shared_read(w, i, static_cast<u32>(address), size, lane);
      if (!found) return;
      std::memcpy(in_shared, found, size);
    } else if (!(at = global_bytes(w, i, address, size, true, lane, true))) {
      return;
    }
    u64 old = 0;
    std::memcpy(&old, at, size);
    const u64 swapped = i.operands[3] < 0 ? 0 : w.reg(i.operands[3])[lane], value = w.reg(i.operands[2])[lane];
    const u64 result = combined(i.modifiers[2], old, value & (size == 4 ? 0xffffffff : ~0ull), swapped, size,
                                i.modifiers[3], i.modifiers[4]);
    std::memcpy(at, &result, size);
    if (space == kShared) shared_write(w, i, static_cast<u32>(address), in_shared, size, lane);
    if (i.operands[0] >= 0) w.reg(i.operands[0])[lane] = old;
    auto& released = launch.released[address];
    if (i.modifiers[5] & 1)
      for (const auto& [other, time] : released) block.visible[other] = std::max(block.visible[other], time);
    if (i.modifiers[5] & 2) {
      for (const auto& [other, time] : block.visible) released[other] = std::max(released[other], time);
      released[block.id] = block.time++;
    }
  });
}

void run_copy(Warp& w, const CopyAsync& copy) {
  each(copy.lanes, [&](int lane) {
    u8 data[16] = {};
    if (copy.bytes[lane]) {
      const u8* from = global_bytes(w, *copy.instruction, copy.from[lane], copy.bytes[lane], false, lane);
      from ? std::memcpy(data, from, copy.bytes[lane]) : std::memset(data, 0xff, copy.bytes[lane]);
    }
    shared_write(w, *copy.instruction, copy.to[lane], data, copy.size, lane);
  });
}

// cp.async. Operands: to, from, bytes taken (-1: all); immediate: offset to; modifiers: size, offset from.
void copy_async(Warp& w, const Instruction& i, u32 lanes) {
  Launch& launch = *w.block->launch;
  CopyAsync copy{&i, lanes, static_cast<u32>(i.modifiers[0]), {}, {}, {}, w.copy_group};
  u32 reading = 0;
  each(lanes, [&](int lane) {
    copy.to[lane] = static_cast<u32>(w.reg(i.operands[0])[lane] + i.immediate);
    copy.from[lane] = w.reg(i.operands[1])[lane] + i.modifiers[1];
    copy.bytes[lane] = i.operands[2] < 0 ? copy.size : static_cast<u32>(w.reg(i.operands[2])[lane]);
    if (copy.bytes[lane] > copy.size) launch.error(&i, "cp.async takes %u of %u bytes", copy.bytes[lane], copy.size);
    copy.bytes[lane] = std::min(copy.bytes[lane], copy.size);
    if (copy.bytes[lane]) reading |= 1u << lane;
  });
  if (launch.count) {
    Counters& n = launch.counters;
    if (reading) count_global(copy.from, reading, copy.size, n.copy_requests, n.copy_sectors, n.copy_bytes);
    ++n.shared_store_requests;
    count_shared(copy.to, lanes, copy.size, n.shared_store_wavefronts, n.shared_store_ideal);
  }
  launch.late ? w.copies.push_back(copy) : run_copy(w, copy);
}

void wait_copies(Warp& w, const Instruction& i, u32) {  // modifier: groups that may stay under way; -1: wait for all
  const int last = i.modifiers[0] < 0 ? w.copy_group : w.copy_group - i.modifiers[0] - 1;
  for (; !w.copies.empty() && w.copies.front().group <= last; w.copies.pop_front()) run_copy(w, w.copies.front());
}

// ldmatrix and stmatrix. Operand: address; modifiers: matrices, transposed; list: registers.
template <bool write>
void matrix_access(Warp& w, const Instruction& i, u32) {
  Launch& launch = *w.block->launch;
  const s32* values = &launch.kernel->lists[i.list];
  const u64* address = w.reg(i.operands[0]);
  u64 found[4][kLanes];
  for (int m = 0; m < i.modifiers[0]; ++m) {
    u32 rows[kLanes];
    u16 tile[8][8];
    const auto at = [&](int lane, int half) -> u16& {  // the element that a lane holds
      const int row = lane >> 2, column = (lane & 3) * 2 + half;
      return i.modifiers[1] ? tile[column][row] : tile[row][column];
    };
    if (write)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int half = 0; half < 2; ++half) at(lane, half) = static_cast<u16>(w.reg(values[m])[lane] >> 16 * half);
    for (int row = 0; row < 8; ++row) {
      const int lane = m * 8 + row;
      rows[row] = static_cast<u32>(address[lane] + i.immediate);
      if (write) {
        shared_write(w, i, rows[row], reinterpret_cast<u8*>(tile[row]), 16, lane);
      } else {
        const u8* bytes = shared_read(w, i, rows[row], 16, lane);
        bytes ? std::memcpy(tile[row], bytes, 16) : std::memset(tile[row], 0xff, 16);
      }
    }
    if (!write)
      for (int lane = 0; lane < kLanes; ++lane) found[m][lane] = at(lane, 0) | u32{at(lane, 1)} << 16;
    Counters& n = launch.counters;
    if (launch.count)
      count_shared(rows, 0xff, 16, write ? n.shared_store_wavefronts : n.ldmatrix_wavefronts,
                   write ? n.shared_store_ideal : n.ldmatrix_ideal);
  }
  if (write) {
    ++launch.counters.shared_store_requests;
  } else {
    for (int m = 0; m < i.modifiers[0]; ++m) std::memcpy(w.reg(values[m]), found[m], sizeof found[m]);
  }
}

// Operands: result, address. Modifiers: space, and whether the result is an address of it rather than a generic one.
void convert_address(Warp& w, const Instruction& i, u32 lanes) {
  u64 *out = w.reg(i.operands[0]), *in = w.reg(i.operands[1]);
  const u64 local = reinterpret_cast<u64>(w.local.data()), each_lane = w.local.size() / kLanes;
  each(lanes, [&](int lane) {
    const u64 base = i.modifiers[0] == kShared  ? kSharedWindow
                     : i.modifiers[0] == kParam ? reinterpret_cast<u64>(w.block->launch->parameters)
                     : i.modifiers[0] == kLocal ? local + lane * each_lane
                                                : 0;
    out[lane] = i.modifiers[1] ? in[lane] - base : in[lane] + base;
  });
}

}  // namespace

u8* global_bytes(Warp& w, const Instruction& i, u64 address, u32 size, bool write, int lane, bool atomic) {
  Launch& launch = *w.block->launch;
  const char* what = write ? "store" : "load";
  if (size && (size & (size - 1)) == 0 && address % size)
    launch.error(&i, "misaligned global %s of %u bytes at %llx, lane %d", what, size, (unsigned long long)address,
                 lane);
  Range* range = range_of(launch, address);
  if (!range || address + size > range->high) {
    launch.error(&i, "global %s out of bounds: %u bytes at %llx (%s), block %u, warp %d, lane %d", what, size,
                 (unsigned long long)address, range ? range->name.c_str() : "no tensor", w.block->id, w.id, lane);
    return nullptr;
  }
  const u64 offset = address - range->low;
  if (launch.check) check_blocks(*w.block, i, *range, offset, size, write, atomic);
  if (launch.count && size)
    for (u64 s = offset / kSector; s <= (offset + size - 1) / kSector; ++s)
      (write ? range->written : range->read)[s] = true;
  return reinterpret_cast<u8*>(address);
}

const u8* shared_read(Warp& w, const Instruction& i, u32 address, u32 size, int lane, bool async_proxy) {
  Block& block = *w.block;
  u8* found = shared_at(w, i, address, size, false, lane);
  if (!found || !block.launch->check) return found;
  check_shared(block, i, address, size, w.id, w.knows.done, false);
  for (u32 k = 0; k < size; ++k) {
    const u32 word = block.shadow.write[address + k], writer = word & kManyWriters;
    if (!word) {
      block.launch->error(&i, "shared byte %u is read but was never written, block %u, warp %d, lane %d", address + k,
                          block.id, w.id, lane);
      break;
    }
    if (async_proxy && word & kGenericProxy && writer != kManyWriters && word >> 8 > w.knows.fenced.seen[writer - 1]) {
      block.launch->error(&i, "wgmma reads shared byte %u, stored without a fence.proxy.async, block %u", address + k,
                          block.id);
      break;
    }
  }
  std::fill_n(&block.shadow.read[w.id * block.shared.size() + address], size, w.now());
  return found;
}

void shared_write(Warp& w, const Instruction& i, u32 address, const u8* data, u32 size, int lane) {
  Block& block = *w.block;
  u8* found = shared_at(w, i, address, size, true, lane);
  if (!found) return;
  if (block.launch->check) {
    // Warps that hold the same value may all store it: such bytes have many writers, and no check but that of value.
    const u32 word = block.shadow.write[address], writer = word & kManyWriters;
    const bool unordered =
        writer && int(writer) != w.id + 1 && (writer == kManyWriters || word >> 8 > w.knows.done.seen[writer - 1]);
    const bool same = unordered && std::memcmp(found, data, size) == 0;
    if (!same) check_shared(block, i, address, size, w.id, w.knows.done, true);
    const bool generic = i.modifiers[7] == 0;  // encode.py marks cp.async, whose writes wgmma may read without a fence
    const u32 stamp = same ? kManyWriters : w.now() << 8 | (generic ? kGenericProxy : 0) | (w.id + 1);
    std::fill_n(&block.shadow.write[address], size, stamp);
  }
  std::memcpy(found, data, size);
}

void shared_bulk_write(Block& block, const BulkCopy& copy, u32 address, const u8* data, u32 size, u32 time) {
  if (u64{address} + size > block.shared.size())
    return block.launch->error(copy.instruction, "bulk copy out of bounds: %u bytes at %u", size, address);
  if (block.launch->check) {
    check_shared(block, *copy.instruction, address, size, kMostWarps, copy.issuer.done, true);
    std::fill_n(&block.shadow.write[address], size, time << 8 | (kMostWarps + 1));
  }
  std::memcpy(&block.shared[address], data, size);
}

void add_memory(Operations& table) {
  table["ld"] = access<false>, table["st"] = access<true>, table["atom"] = atomic;
  table["cp.async"] = copy_async, table["cp.async.wait"] = wait_copies;
  table["cp.async.commit"] = [](Warp& w, const Instruction&, u32) { ++w.copy_group; };
  table["ldmatrix"] = matrix_access<false>, table["stmatrix"] = matrix_access<true>, table["cvta"] = convert_address;
}

}  // namespace emulator
