// Mbarriers, bulk copies by tensor maps, proxies, and the pool of registers of setmaxnreg.
#include <algorithm>
#include <cstddef>

#include "machine.h"

namespace emulator {
namespace {

// A tensor map of 128 bytes. The device's own form is not public; this one is written by tensormap.replace and by
// device.py alike, and a field that nobody wrote is 0, as Triton relies on.
struct TensorMap {
  u64 base;
  u64 strides[4];  // bytes, of dimensions 1 to 4
  u32 sizes[5];    // elements
  u32 box[5];
  u8 last_dimension, element_type, swizzle;  // types: of tensormap.replace; swizzle: rows of 32, 64, 128 bytes
  u8 filler[45];
};
static_assert(sizeof(TensorMap) == 128);

u32 address_of(Warp& w, const Instruction& i, int lane) {
  return static_cast<u32>(w.reg(i.operands[0])[lane] + i.immediate);
}

Mbarrier* mbarrier_at(Warp& w, const Instruction& i, u32 address) {
  const auto found = w.block->mbarriers.find(address);
  if (found != w.block->mbarriers.end()) return &found->second;
  w.block->launch->error(&i, "there is no mbarrier at shared byte %u", address);
  return nullptr;
}

void complete_if_done(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase, b.pending = b.count;
  b.complete = b.arriving;
}

void initialise(Warp& w, const Instruction& i, u32 lanes) {  // operands: address, count
  each(lanes, [&](int lane) {
    const u32 address = address_of(w, i, lane);
    const u64 none = 0;
    shared_write(w, i, address, reinterpret_cast<const u8*>(&none), 8, lane);
    const int count = static_cast<int>(w.reg(i.operands[1])[lane]);
    w.block->mbarriers[address] = Mbarrier{count, count, 0, 0, {}, {}};
  });
}

void invalidate(Warp& w, const Instruction& i, u32 lanes) {
  each(lanes, [&](int lane) { w.block->mbarriers.erase(address_of(w, i, lane)); });
}

// Operands: address, count or bytes (-1: none). Modifiers: arrives, expects bytes.
void arrive(Warp& w, const Instruction& i, u32 lanes) {
  each(lanes, [&](int lane) {
    Mbarrier* b = mbarrier_at(w, i, address_of(w, i, lane));
    if (!b) return;
    const s64 given = i.operands[1] < 0 ? 1 : static_cast<u32>(w.reg(i.operands[1])[lane]);
    if (i.modifiers[1]) b->bytes += given;
    if (!i.modifiers[0]) return;
    w.pass_on(b->arriving);
    b->pending -= i.modifiers[1] ? 1 : static_cast<int>(given);
    if (b->pending < 0) w.block->launch->error(&i, "an mbarrier gets more arrivals than its count of %d", b->count);
    complete_if_done(*b);
  });
}

u32 element_bytes(u32 code) {  // of tensormap.replace's elemtype
  static constexpr u32 kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  return code < std::size(kBytes) ? kBytes[code] : 0;
}

void run_bulk(Block& block, const BulkCopy& copy) {
  Launch& launch = *block.launch;
  const Instruction& i = *copy.instruction;
  Warp& any = block.warps[0];  // whose name errors carry; no lane issues the reads themselves
  TensorMap map{};
  const u64 parameters = reinterpret_cast<u64>(launch.parameters);
  if (copy.map >= parameters && copy.map + sizeof map <= parameters + launch.parameter_bytes) {
    std::memcpy(&map, reinterpret_cast<const void*>(copy.map), sizeof map);
  } else if (const u8* bytes = global_bytes(any, i, copy.map, 64, false, 0)) {
    std::memcpy(&map, bytes, sizeof map);
    if (std::find(block.fenced_maps.begin(), block.fenced_maps.end(), copy.map) == block.fenced_maps.end())
      launch.error(&i, "a tensor map in global memory is used without fence.proxy.tensormap");
  }
  const int rank = map.last_dimension + 1;
  const u32 size = element_bytes(map.element_type);
  if (rank != i.modifiers[0] || !size)
    return launch.error(&i, "a tensor map of rank %d and type %d is read with %d coordinates", rank, map.element_type,
                        i.modifiers[0]);
  const u32 row_bytes = map.box[0] * size, swizzle_row = map.swizzle ? 16u << map.swizzle : 256 * size;
  if (row_bytes > swizzle_row)
    launch.error(&i, "a box of %u bytes a row is wider than its swizzle of %u", row_bytes, swizzle_row);
  if (copy.to % 128) launch.error(&i, "a bulk copy goes to shared byte %u, not a multiple of 128", copy.to);
  u32 rows = 1;
  for (int d = 1; d < rank; ++d) rows *= map.box[d];
  const u32 time = ++block.bulk_time;
  const s64 first = std::max<s64>(0, -s64{copy.at[0]}),
            last = std::min<s64>(map.box[0], s64{map.sizes[0]} - copy.at[0]);
  std::vector<u8> data(row_bytes);
  for (u32 r = 0; r < rows; ++r) {
    u64 from = map.base + (copy.at[0] + first) * size;
    bool inside = first < last;
    u32 rest = r;
    for (int d = 1; d < rank; ++d) {
      const s64 at = copy.at[d] + s64{rest % map.box[d]};
      rest /= map.box[d];
      inside = inside && at >= 0 && at < map.sizes[d];
      from += at * map.strides[d - 1];
    }
    std::fill(data.begin(), data.end(), 0);
    if (inside) {
      const u32 bytes = static_cast<u32>(last - first) * size;
      for (u32 k = 0, part; k < bytes; k += part) {  // in aligned parts: a box may begin at any element
        part = static_cast<u32>(std::min<u64>({16, bytes - k, (from + k) & -(from + k)}));
        if (const u8* found = global_bytes(any, i, from + k, part, false, 0))
          std::memcpy(&data[first * size + k], found, part);
      }
      if (launch.count) launch.counters.bulk_bytes += bytes;
    }
    for (u32 k = 0; k < row_bytes; k += 16) {
      const u32 to = copy.to + r * row_bytes + k, turn = map.swizzle ? to >> 3 & ((16u << map.swizzle) - 16) : 0;
      shared_bulk_write(block, copy, to ^ turn, &data[k], std::min(16u, row_bytes - k), time);
    }
  }
  ++launch.counters.bulk_requests;
  if (Mbarrier* b = mbarrier_at(any, i, copy.mbarrier)) {
    b->arriving.join(copy.issuer);
    b->arriving.done.seen[kMostWarps] = std::max(b->arriving.done.seen[kMostWarps], time);
    b->bytes -= s64{rows} * row_bytes;
    complete_if_done(*b);
  }
}

void bulk_copy(Warp& w, const Instruction& i, u32 lanes) {  // operands: to, map, mbarrier; modifier: rank; list: where
  each(lanes, [&](int lane) {
    BulkCopy copy{
        &i, w.reg(i.operands[1])[lane], {}, address_of(w, i, lane), static_cast<u32>(w.reg(i.operands[2])[lane]), {},
        0};
    for (int d = 0; d < i.modifiers[0]; ++d)
      copy.at[d] = static_cast<s32>(w.reg(w.block->launch->kernel->lists[i.list + d])[lane]);
    w.pass_on(copy.issuer);
    if (w.block->launch->late) return w.block->bulk.push_back(copy);
    run_bulk(*w.block, copy);
  });
}

// Operands: address of the map, value; modifiers: field, index.
void replace_field(Warp& w, const Instruction& i, u32 lanes) {
  enum Field { kAddress, kRank, kBox, kSize, kStride, kElementType, kSwizzle, kIgnored };
  each(lanes, [&](int lane) {
    const u32 address = address_of(w, i, lane), index = i.modifiers[1];
    const u64 value = w.reg(i.operands[1])[lane];
    const auto put = [&](size_t offset, u32 size, u64 what) {
      shared_write(w, i, address + offset, reinterpret_cast<u8*>(&what), size, lane);
    };
    switch (i.modifiers[0]) {
      case kAddress: return put(offsetof(TensorMap, base), 8, value);
      case kRank: return put(offsetof(TensorMap, last_dimension), 1, value);
      case kBox: return put(offsetof(TensorMap, box) + 4 * index, 4, value);
      case kSize: return put(offsetof(TensorMap, sizes) + 4 * index, 4, value);
      case kStride: return put(offsetof(TensorMap, strides) + 8 * index, 8, value);
      case kElementType: return put(offsetof(TensorMap, element_type), 1, value);
      case kSwizzle: return put(offsetof(TensorMap, swizzle), 1, value);
    }
  });
}

void publish_map(Warp& w, const Instruction& i, u32 lanes) {  // operands: to in global memory, from in shared
  const int lane = __builtin_ctz(lanes);
  for (u32 k = 0; k < sizeof(TensorMap); k += 16) {
    const u8* from = shared_read(w, i, static_cast<u32>(w.reg(i.operands[1])[lane]) + k, 16, lane);
    u8* to = global_bytes(w, i, w.reg(i.operands[0])[lane] + k, 16, true, lane);
    if (from && to) std::memcpy(to, from, 16);
  }
}

void acquire_map(Warp& w, const Instruction& i, u32 lanes) {
  each(lanes, [&](int lane) { w.block->fenced_maps.push_back(w.reg(i.operands[0])[lane]); });
}

// Late copies come when a warp asks for them a second time.
void land_late_copies(Warp& w, u32 mbarrier) {
  std::vector<BulkCopy>& bulk = w.block->bulk;
  for (size_t k = 0; k < bulk.size();) {
    const BulkCopy copy = bulk[k];
    if (copy.mbarrier == mbarrier && has(copy.asked_by, w.id)) {
      bulk.erase(bulk.begin() + k);
      run_bulk(*w.block, copy);
    } else {
      bulk[k++].asked_by |= u32{copy.mbarrier == mbarrier} << w.id;
    }
  }
}

// Operands: result, address, parity. A phase that is complete hands on what was done before it.
bool wait_phase(Warp& w, const Instruction& i, u32 lanes) {
  bool all = true;
  u32 last = ~0u;
  each(lanes, [&](int lane) {
    const u32 address = static_cast<u32>(w.reg(i.operands[1])[lane] + i.immediate);
    if (address != last) land_late_copies(w, last = address);
    Mbarrier* b = mbarrier_at(w, i, address);
    const bool done = !b || (b->phase & 1) != (w.reg(i.operands[2])[lane] & 1);
    if (b && done) w.knows.join(b->complete);
    w.reg(i.operands[0])[lane] = done;
    all = all && done;
  });
  return all;
}

}  // namespace

// Modifier: 0 an mbarrier's phase, 1 more registers, 2 fewer; immediate: registers a thread.
bool try_wait(Warp& w, const Instruction& i, u32 lanes) {
  if (i.modifiers[0] == 0) return wait_phase(w, i, lanes);
  const s64 change = (i.immediate - s64{w.register_limit}) * kLanes;
  if (i.immediate % 8 || i.immediate < 24 || i.immediate > 256 || (i.modifiers[0] == 1 ? change < 0 : change > 0))
    w.block->launch->error(&i, "setmaxnreg asks for %lld registers where %u are held", (long long)i.immediate,
                           w.register_limit);
  if (change > w.block->free_registers) return false;
  w.block->free_registers -= change;
  w.register_limit = static_cast<u32>(i.immediate);
  return true;
}

void add_asynchronous(Operations& table) {
  table["mbarrier.init"] = initialise, table["mbarrier.inval"] = invalidate, table["mbarrier.arrive"] = arrive;
  table["bulk"] = bulk_copy, table["tensormap.replace"] = replace_field, table["tensormap.publish"] = publish_map;
  table["tensormap.acquire"] = acquire_map;
  table["fence.proxy.async"] = [](Warp& w, const Instruction&, u32) { w.knows.fenced.join(w.knows.done); };
}

}  // namespace emulator
