// Scratch of the CPU kernels: padded row-major blocks in the accumulation type, and their transfer from and to tensors.
//
// Only the transfer knows the storage type, so that the kernels are compiled twice (float, double) and not once per
// (storage, accumulation) pair.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>

namespace csat::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPanelBytes = 64;  // columns are padded to, and computed in, panels of one cache line

template <class R>
constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(R));

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class R>
constexpr int64_t padded(int64_t columns) {
  return divide_up(columns, kPanel<R>) * kPanel<R>;
}

// A padded row-major matrix in somebody's scratch.
template <class R>
struct Block {
  R* data;
  int64_t ld;
  R* row(int64_t i) const { return data + i * ld; }
};

template <class R>
void clear(Block<R> block, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) std::fill_n(block.row(i), padded<R>(columns), R(0));
}

// to = from, whole padded rows.
template <class R>
void copy(Block<R> from, int64_t rows, int64_t columns, Block<R> to) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from.row(i), padded<R>(columns), to.row(i));
}

// `count` blocks of (rows, columns), zero at first. The leading dimension is an odd number of cache lines: a column
// of panels then touches every set of the cache instead of a few.
template <class R>
class Stack {
 public:
  Stack(int64_t count, int64_t rows, int64_t columns)
      : ld_(leading_dimension(columns)), stride_(rows * ld_), size_(count * rows * ld_) {
    data_.reset(
        static_cast<R*>(::operator new(std::max<int64_t>(size_, 1) * sizeof(R), std::align_val_t(kPanelBytes))));
    std::fill_n(data_.get(), size_, R(0));
  }
  Block<R> operator[](int64_t i) const { return {data_.get() + i * stride_, ld_}; }
  R* data() const { return data_.get(); }
  int64_t ld() const { return ld_; }

 private:
  struct Free {
    void operator()(R* p) const { ::operator delete(p, std::align_val_t(kPanelBytes)); }
  };
  static int64_t leading_dimension(int64_t columns) {
    const int64_t panels = std::max<int64_t>(divide_up(columns, kPanel<R>), 1);
    return (panels | 1) * kPanel<R>;
  }
  int64_t ld_, stride_, size_;
  std::unique_ptr<R, Free> data_;
};

// A strided matrix inside a tensor. Rows or columns may be picked by an index list (kept tokens).
struct View {
  void* data;
  ScalarType type;
  int64_t row, col;
  const int64_t* row_index = nullptr;
  const int64_t* col_index = nullptr;

  View transposed() const { return {data, type, col, row, col_index, row_index}; }
};

inline void* address(const void* data, ScalarType type, int64_t offset) {
  const int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  return static_cast<char*>(const_cast<void*>(data)) + offset * bytes;
}

// Pointer, strides and sizes of a tensor, read once; `matrix(i, j)` is its view over the last two axes.
class Array {
 public:
  explicit Array(const Tensor& t)
      : data_(t.numel() == 0 ? nullptr : t.data_ptr()), type_(t.scalar_type()), dims_(t.dim()) {
    for (int64_t i = 0; i < dims_; ++i) stride_[i] = t.size(i) == 1 ? 0 : t.stride(i);
    // An axis of size 1 broadcasts over leading indices; inside a matrix its stride is never used.
    if (dims_ > 0 && t.size(dims_ - 1) == 1) stride_[dims_ - 1] = 1;
  }
  // The matrix over the last two axes at leading indices (i, j), starting at row `first`.
  View matrix(int64_t i, int64_t j, int64_t first = 0) const {
    const int64_t offset = i * stride_[0] + (dims_ == 4 ? j * stride_[1] : 0) + first * stride_[dims_ - 2];
    return {address(data_, type_, offset), type_, stride_[dims_ - 2], stride_[dims_ - 1]};
  }
  // Row vectors as a matrix of one row.
  View row(int64_t i, int64_t j) const {
    const int64_t offset = i * stride_[0] + (dims_ == 3 ? j * stride_[1] : 0);
    return {address(data_, type_, offset), type_, 0, stride_[dims_ - 1]};
  }

 private:
  void* data_;
  ScalarType type_;
  int64_t dims_;
  int64_t stride_[4] = {0, 0, 0, 0};
};

// Calls f with a null pointer of the storage type.
template <class F>
void with_storage(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<c10::Half*>(nullptr));
    default:
      throw std::logic_error("csat: storage type not checked at the binding");
  }
}

// Calls f with a zero of the accumulation type of t's dtype.
template <class F>
void with_accumulator(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Double) return f(0.0);
  return f(0.f);
}

// block[i, j] = view[i, j]; the padding of the block is left as it is.
template <class R>
void load(const View& view, int64_t rows, int64_t columns, Block<R> block) {
  if (rows == 0 || columns == 0) return;
  with_storage(view.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* source = static_cast<const T*>(view.data);
    const auto row_of = [&](int64_t i) { return source + (view.row_index ? view.row_index[i] : i) * view.row; };
    if (view.col == 1 && !view.col_index) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = row_of(i);
        R* to = block.row(i);
        for (int64_t j = 0; j < columns; ++j) to[j] = static_cast<R>(from[j]);
      }
    } else if (view.row == 1 && !view.row_index) {  // the rows of the source are columns here: read along them
      for (int64_t j = 0; j < columns; ++j) {
        const T* from = source + (view.col_index ? view.col_index[j] : j) * view.col;
        for (int64_t i = 0; i < rows; ++i) block.row(i)[j] = static_cast<R>(from[i]);
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = row_of(i);
        for (int64_t j = 0; j < columns; ++j)
          block.row(i)[j] = static_cast<R>(from[(view.col_index ? view.col_index[j] : j) * view.col]);
      }
    }
  });
}

// Whether a view lies as a block of R does.
template <class R>
bool lies_as_block(const View& view) {
  const ScalarType own = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;
  return view.type == own && view.col == 1 && !view.row_index && !view.col_index;
}
template <class R>
Block<R> as_block(const View& view) {
  return {static_cast<R*>(view.data), view.row};
}

// The left factor of a product: in its place, or loaded to scratch.
template <class R>
Block<R> left_factor(const View& view, int64_t rows, int64_t columns, Block<R> scratch) {
  if (lies_as_block<R>(view)) return as_block<R>(view);
  load(view, rows, columns, scratch);
  return scratch;
}
// The right one, which is read by whole panels of columns.
template <class R>
Block<R> right_factor(const View& view, int64_t rows, int64_t columns, Block<R> scratch) {
  if (columns % kPanel<R> == 0) return left_factor(view, rows, columns, scratch);
  load(view, rows, columns, scratch);
  return scratch;
}
// Where a product is summed, by whole panels too: the place it belongs to, or scratch, which `store` brings there.
template <class R>
Block<R> sum_of(const View& view, int64_t columns, Block<R> scratch) {
  return columns % kPanel<R> == 0 && lies_as_block<R>(view) ? as_block<R>(view) : scratch;
}

// view[i, j] = block[i, j], rounded to the storage type; the view's columns are contiguous, as in every output.
template <class R>
void store(Block<R> block, int64_t rows, int64_t columns, const View& view) {
  if (rows == 0 || columns == 0 || block.data == view.data) return;
  with_storage(view.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* target = static_cast<T*>(view.data);
    for (int64_t i = 0; i < rows; ++i) {
      const R* from = block.row(i);
      T* to = target + i * view.row;
      for (int64_t j = 0; j < columns; ++j) to[j] = static_cast<T>(from[j]);
    }
  });
}

// The block as it would come back from a tensor of this storage type.
template <class R>
void round_to(ScalarType type, int64_t rows, int64_t columns, Block<R> block) {
  with_storage(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) block.row(i)[j] = static_cast<R>(static_cast<T>(block.row(i)[j]));
  });
}

// Runs f(first, last) over [0, units) on torch's threads, in slices worth at least ~64k multiply-adds each.
template <class F>
void parallel(int64_t units, int64_t work_per_unit, const F& f) {
  if (units == 0) return;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(work_per_unit, 1));
  torch::stable::parallel_for(0, units, grain, f);
}

// Work split into a number of groups that depends on sizes alone: each group sums in order into its own partial and the
// partials are added in order, so a result is the same bit for bit for any number of threads.
struct Groups {
  int64_t items, count;
  Groups(int64_t items, int64_t owners)
      : items(items),
        count(std::clamp<int64_t>(divide_up(kPartials, std::max<int64_t>(owners, 1)), 1, std::max<int64_t>(items, 1))) {
  }
  int64_t begin(int64_t group) const { return group * items / count; }
  int64_t end(int64_t group) const { return (group + 1) * items / count; }

 private:
  static constexpr int64_t kPartials = 64;
};

// sum += part over whole padded rows.
template <class R>
void add(Block<R> part, int64_t rows, int64_t columns, Block<R> sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) sum.row(i)[j] += part.row(i)[j];
}

}  // namespace csat::cpu
