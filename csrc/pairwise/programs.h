// All programs of the pairwise engine: their names, and what runs the one at a place of the list. Nothing else lists
// them.
#pragma once

#include <array>
#include <string_view>
#include <utility>

#include "pairwise/losses.h"
#include "pairwise/shares.h"

namespace tilewise {

template <typename... Losses, typename... Shares>
ProgramList<Losses..., Shares...> joined(ProgramList<Losses...>, ProgramList<Shares...>);

using PairPrograms = decltype(joined(PairLosses{}, PairShares{}));

template <typename... Programs>
constexpr std::array<PairProgram, sizeof...(Programs)> described(ProgramList<Programs...>) {
  static_assert(((Programs::kProgram.parameters <= kPairParameters) && ...));
  return {Programs::kProgram...};
}

inline constexpr auto kPairPrograms = described(PairPrograms{});

// The place of a program in the list, -1 where no program has the name.
inline int place_of_program(std::string_view name) {
  for (size_t i = 0; i < kPairPrograms.size(); ++i) {
    if (name == kPairPrograms[i].name) return static_cast<int>(i);
  }
  return -1;
}

template <typename Program, typename Function>
auto called_with(const Function& f) {
  return f(Program{});
}

// f of the program at a place of the list
template <typename Function, typename First, typename... More>
auto with_program(int place, const Function& f, ProgramList<First, More...>) {
  using Call = decltype(&called_with<First, Function>);
  constexpr Call kCalls[] = {called_with<First, Function>, called_with<More, Function>...};
  return kCalls[place](f);
}

template <typename Program, typename T, typename Row>
TILEWISE_PROGRAM void run_program(Program, Row& row, const T* parameters) {
  const auto run = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    Program::template run<T>(row, parameters[kIndex]...);
  };
  run(std::make_index_sequence<Program::kProgram.parameters>{});
}

}  // namespace tilewise
