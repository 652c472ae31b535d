// A step on tensors that end where their memory ends, of every kind of plane; with an argument, tiles
// after memory ran out. Built with the address sanitizer by test_cpp_backend.py, which stops at the
// first number that is read or written outside.
#include <vector>

#include "step.cpp"

typedef std::vector<A> Numbers;

void step(int64_t batch, int64_t channels, int64_t height, int64_t width, bool pixels) {
  const int64_t B = batch, C = channels, size = B * C * height * width;
  std::vector<T> x(size), dy(size), y(size), dx(size);
  for (int64_t i = 0; i < size; i++) {
    narrow(A(i * 37 % 101) / 50 - 1, x[i]);
    narrow(A(i * 53 % 97) / 50 - 1, dy[i]);
  }
  Numbers weight(C, 1), kernel(C * KK, A(0.3)), bias(C), center(C), scale(C), offset(C);
  Numbers mean(C), var(C, 1), image_mean(B * C), row(2 * C + 3), out(2 * C + 1), d_stats(2 * C);
  Numbers d_weight(C), d_kernel(C * KK), d_bias(C), d_center(C), d_scale(C), d_offset(C);
  Numbers rest(ubn_rest_size(B, C));
  A similarity = 1;
  int64_t tracked = 0;
  unsigned char gate = 1;
  const int64_t threads = 1, scale_from_input = 0, one = 1;
  const Layer layer{B,
                    C,
                    height,
                    width,
                    pixels,
                    threads,
                    scale_from_input,
                    1e-5,
                    weight.data(),
                    kernel.data(),
                    bias.data(),
                    center.data(),
                    scale.data(),
                    offset.data()};
  const State state{one,         one,        0,           one,      0.1,  0.15, 0.1,
                    mean.data(), var.data(), &similarity, &tracked, &gate};
  ubn_measure(&layer, x.data(), 1, image_mean.data(), row.data());
  ubn_normalize(&layer, &state, x.data(), image_mean.data(), row.data(), 1, y.data(), out.data());
  ubn_backward_sums(&layer, x.data(), dy.data(), image_mean.data(), 1, out.data(), d_stats.data(),
                    d_weight.data(), d_kernel.data(), d_bias.data(), d_scale.data(),
                    d_offset.data(), rest.data());
  ubn_backward_input(&layer, x.data(), dy.data(), out.data(), d_stats.data(), rest.data(),
                     dx.data(), d_center.data());
}

// 0 where the borders are zeros. The sanitizer is asked to give freed memory away at once, filled
// with other numbers.
int tiles_after_memory_ran_out() {
  Layer small{}, huge{};
  small.batch = small.threads = 1, small.channels = N, small.height = small.width = 4;
  huge = small, huge.height = huge.width = int64_t(1) << 20;
  Plan(small).tiles<1>();
  try {
    Plan(huge).tiles<1>();
    return 1;  // there was memory
  } catch (const std::bad_alloc&) {
  }
  const auto [tile] = Plan(small).tiles<1>();
  for (const A* number = tile.at(0, -1); number < tile.at(0, 0); number++)
    if (*number != 0) return 2;
  return 0;
}

int main(int count, char**) {
  if (count > 1) return tiles_after_memory_ran_out();
  for (int64_t batch : {1, 3})
    for (int64_t channels : {1, 2, 7, 20})
      for (int64_t height : {1, 2, 5, 11})
        for (int64_t width : {1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 65})
          for (bool pixels : {false, true}) step(batch, channels, height, width, pixels);
  step(2, 70, 6, 600, true);  // each row is a part of its own
  step(2, WIDE + 5, 3, 4, true);
}
