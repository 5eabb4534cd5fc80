// The machine's controls as Python functions, added to the module that carries the kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "control.h"

namespace simt {

inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "configure",
      [](int schedule, unsigned seed, bool check, bool profile) {
        Options o;
        o.schedule = schedule;
        o.seed = seed;
        o.check = check;
        o.profile = profile;
        options() = o;
      },
      py::arg("schedule") = 0, py::arg("seed") = 0, py::arg("check") = false, py::arg("profile") = false,
      "schedule: 0 in order, 1 reversed, 2 random");
  m.def("add_buffer", [](uintptr_t p, size_t bytes, const std::string& name) {
    add_buffer(reinterpret_cast<void*>(p), bytes, name.c_str());
  });
  m.def("clear_buffers", &clear_buffers);
  m.def("stats", [] {
    const Stats s = std::exchange(stats(), {});
    py::dict d;
    d["launches"] = s.launches;
    d["blocks"] = s.blocks;
    d["threads"] = s.threads;
    d["switches"] = s.switches;
    d["barriers"] = s.barriers;
    d["collectives"] = s.collectives;
    d["accesses"] = s.accesses;
    return d;
  });
  m.def("profiles", [] {
    py::list out;
    for (const Profile& p : take_profiles()) {
      py::dict d;
      d["where"] = p.where;
      d["space"] = p.shared ? "shared" : "global";
      d["write"] = p.write;
      d["bytes"] = p.bytes;
      d["requests"] = p.requests;
      d["actual"] = p.actual;
      d["ideal"] = p.ideal;
      out.append(d);
    }
    return out;
  });
}

}  // namespace simt
