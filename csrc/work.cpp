// Work of a basis, cut into pieces on the host: blocks for CPUs; items, groups and tasks for GPUs.
#include <algorithm>
#include <deque>

#include "twa.h"

namespace twa {

std::vector<Block> make_blocks(const int64_t* numel, int64_t count, const int32_t* tile_segment,
                               int64_t most) {
  std::vector<Block> blocks;
  const auto segment = [&](int64_t t) { return tile_segment ? tile_segment[t] : 0; };
  int64_t tile = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t begin = tile, end = tile + num_tiles(numel[k]);
    while (tile < end) {
      const int64_t first = tile++;
      while (tile < end && (tile - begin) % most != 0 && segment(tile) == segment(first)) ++tile;
      blocks.push_back({k, (first - begin) * kTileColumns, first, tile - first, segment(first)});
    }
  }
  return blocks;
}

HostWork make_work(const int64_t* numel, int64_t count, const int32_t* tile_segment,
                   int64_t num_segments, int bits) {
  HostWork work;
  int64_t tiles = 0;
  for (int64_t k = 0; k < count; ++k) {
    work.numel.push_back(numel[k]), work.tile_begin.push_back(tiles);
    tiles += num_tiles(numel[k]);
  }
  std::vector<Block> items = make_blocks(numel, count, tile_segment, item_tiles(bits));
  std::stable_sort(items.begin(), items.end(),
                   [](const Block& a, const Block& b) { return a.segment < b.segment; });
  const int64_t total = static_cast<int64_t>(items.size());
  const auto groups = [&] { return static_cast<int32_t>(work.group_begin.size()); };
  int64_t at = 0;
  for (int64_t l = 0; l < num_segments; ++l) {
    work.segment_groups.push_back(groups());
    for (int64_t first = at; at < total && items[at].segment == l; ++at) {
      if ((at - first) % kGroupItems == 0) work.group_begin.push_back(static_cast<int32_t>(at));
      const Block& item = items[at];
      work.item_tensor.push_back(static_cast<int32_t>(item.tensor));
      work.item_tile.push_back(item.first_tile);
      work.item_tiles.push_back(static_cast<int32_t>(item.tiles));
      work.item_segment.push_back(item.segment), work.item_group.push_back(groups() - 1);
    }
  }
  work.segment_groups.push_back(groups());
  work.group_begin.push_back(static_cast<int32_t>(total));
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
    for (int32_t item = waiting.front().end; item-- > waiting.front().first;)
      tasks.push_back(-1 - item);
    waiting.pop_front();
  };
  for (size_t l = 0; l + 1 < work.segment_groups.size(); ++l) {
    const int32_t first = work.group_begin[work.segment_groups[l]];
    const int32_t end = work.group_begin[work.segment_groups[l + 1]];
    if (first == end) return {};
    for (int32_t item = first; item < end; ++item) {
      tasks.push_back(item);
      while (!waiting.empty() &&
             static_cast<int64_t>(tasks.size() - waiting.front().projected) >= window)
        reconstruct();
    }
    waiting.push_back({first, end, tasks.size()});
  }
  while (!waiting.empty()) reconstruct();
  return tasks;
}

}  // namespace twa
