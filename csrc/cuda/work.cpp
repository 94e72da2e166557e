// Tables for the CUDA kernels, made on the host: work items of a basis, and the order of a step's tasks.
#include <algorithm>
#include <deque>

#include "../twa.h"

namespace twa {

HostWork make_work(const int64_t* numel, int64_t count, const int32_t* tile_segment, int64_t num_segments, int bits) {
  struct Item {
    int64_t tile;
    int32_t tensor, tiles;
  };
  std::vector<std::vector<Item>> of_segment(num_segments);
  HostWork work;
  int64_t tile = 0;
  for (int64_t k = 0; k < count; ++k) {
    work.tile_begin.push_back(tile);
    for (const int64_t end = tile + num_tiles(numel[k]); tile < end;) {
      int64_t last = tile + 1;
      while (last < end && last - tile < item_tiles(bits) && tile_segment[last] == tile_segment[tile]) ++last;
      of_segment[tile_segment[tile]].push_back({tile, static_cast<int32_t>(k), static_cast<int32_t>(last - tile)});
      tile = last;
    }
  }
  for (int64_t l = 0; l < num_segments; ++l) {
    work.segment_groups.push_back(static_cast<int32_t>(work.group_begin.size()));
    for (size_t k = 0; k < of_segment[l].size(); ++k) {
      if (k % kGroupItems == 0) work.group_begin.push_back(static_cast<int32_t>(work.item_tile.size()));
      const Item& item = of_segment[l][k];
      work.item_tensor.push_back(item.tensor), work.item_tile.push_back(item.tile), work.item_tiles.push_back(item.tiles);
      work.item_segment.push_back(static_cast<int32_t>(l)), work.item_group.push_back(static_cast<int32_t>(work.group_begin.size()) - 1);
    }
  }
  work.segment_groups.push_back(static_cast<int32_t>(work.group_begin.size()));
  work.group_begin.push_back(static_cast<int32_t>(work.item_tile.size()));
  return work;
}

std::vector<int32_t> make_tasks(const HostWork& work, int64_t window) {
  std::vector<int32_t> tasks;
  struct Segment {
    int32_t first, end;  // items
    size_t projected;    // tasks when its last projection was handed out
  };
  std::deque<Segment> waiting;
  const auto reconstruct = [&] {
    for (int32_t item = waiting.front().end; item-- > waiting.front().first;) tasks.push_back(-1 - item);
    waiting.pop_front();
  };
  for (size_t l = 0; l + 1 < work.segment_groups.size(); ++l) {
    const int32_t first = work.group_begin[work.segment_groups[l]], end = work.group_begin[work.segment_groups[l + 1]];
    if (first == end) return {};
    for (int32_t item = first; item < end; ++item) {
      tasks.push_back(item);
      while (!waiting.empty() && static_cast<int64_t>(tasks.size() - waiting.front().projected) >= window) reconstruct();
    }
    waiting.push_back({first, end, tasks.size()});
  }
  while (!waiting.empty()) reconstruct();
  return tasks;
}

}  // namespace twa
