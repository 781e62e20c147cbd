// one_by_one.h: vmap for primitives that have no batched form of what is mapped.
#pragma once

#include <utility>
#include <vector>

#include "mlx/ops.h"

namespace mfa {

namespace mx = mlx::core;

// `run`, from inputs to outputs, for each mapped entry; the results are stacked along a new first axis.
template <typename Run>
std::pair<std::vector<mx::array>, std::vector<int>> one_by_one(const std::vector<mx::array>& inputs,
                                                               const std::vector<int>& axes, mx::Stream s,
                                                               const Run& run) {
  int entries = 1;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) entries = inputs[i].shape(axes[i]);
  }
  std::vector<std::vector<mx::array>> columns;
  for (int v = 0; v < entries; ++v) {
    std::vector<mx::array> mine;
    for (size_t i = 0; i < inputs.size(); ++i) {
      mine.push_back(axes[i] < 0 ? inputs[i] : mx::take(inputs[i], v, axes[i], s));
    }
    const std::vector<mx::array> outputs = run(std::move(mine));
    columns.resize(outputs.size());
    for (size_t n = 0; n < outputs.size(); ++n) columns[n].push_back(outputs[n]);
  }
  std::vector<mx::array> stacked;
  for (const auto& column : columns) stacked.push_back(mx::stack(column, 0, s));
  std::vector<int> out_axes(stacked.size(), 0);
  return {std::move(stacked), std::move(out_axes)};
}

}  // namespace mfa
