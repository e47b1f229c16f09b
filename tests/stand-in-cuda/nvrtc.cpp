// Compiles CUDA sources for the CPU, by the C++ compiler. Each source that a program compiles adds a letter to
// the file that STAND_IN_COMPILES names.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <regex>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

struct Program {
    std::string source, library, log;
};

// The device's own architecture is among them, unless STAND_IN_OLD_NVRTC is set: then the newest before it is to
// be taken.
static bool old() { return getenv("STAND_IN_OLD_NVRTC"); }

API int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
API int nvrtcGetNumSupportedArchs(int *count) { return *count = 3, 0; }
API int nvrtcGetSupportedArchs(int *known) {
    known[0] = 75, known[1] = old() ? 90 : 80, known[2] = 100;
    return 0;
}
API int nvrtcCreateProgram(Program **program, const char *source, const char *, int, void *, void *) {
    *program = new Program{source, "", ""};
    return 0;
}
API int nvrtcDestroyProgram(Program **program) { return delete *program, 0; }

API int nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    // Kept: it is the same for the same source and options. One thread at a time writes it.
    static std::mutex lock;
    std::lock_guard<std::mutex> guard(lock);
    if (const char *path = getenv("STAND_IN_COMPILES")) std::ofstream(path, std::ios::app) << 'c';
    std::string definitions;
    for (int i = 0; i < count; ++i) {
        const char *expected = old() ? "compute_75" : "sm_80";
        if (!strncmp(options[i], "--gpu-architecture=", 19) && strcmp(options[i] + 19, expected)) return 5;
        if (!strncmp(options[i], "-D", 2)) definitions += std::string(" ") + options[i];
    }
    std::string own(STAND_IN_DIR), source = "#include \"" + own + "/prelude.h\"\n" + program->source + "\n";
    std::regex kernel("__global__\\s+void\\s+(\\w+)\\s*\\(");
    auto end = std::sregex_iterator();
    for (auto it = std::sregex_iterator(program->source.begin(), program->source.end(), kernel); it != end; ++it) {
        source += "STAND_IN_KERNEL(" + (*it)[1].str() + ")\n";
    }
    std::ifstream prelude(own + "/prelude.h");
    std::stringstream text;
    text << prelude.rdbuf();
    const char *flags = getenv("STAND_IN_CXXFLAGS") ? getenv("STAND_IN_CXXFLAGS") : "-O1";
    size_t hash = std::hash<std::string>()(source + text.str() + definitions + flags);
    char name[64];
    snprintf(name, sizeof name, "kernels-%016zx", hash);
    std::string base = std::string(STAND_IN_BUILD) + "/" + name;
    program->library = base + ".so";
    if (!access(program->library.c_str(), R_OK)) return 0;
    std::string unique = base + "." + std::to_string(getpid());
    std::ofstream(unique + ".cpp") << source;
    std::string command = std::string("c++ -std=c++17 -g -fPIC -shared -ffp-contract=off "
                          "-fsanitize=alignment -fsanitize-undefined-trap-on-error ") + flags + definitions + " -o " +
                          unique + ".so " + unique + ".cpp 2> " + unique + ".log && mv " + unique + ".so " +
                          program->library;
    if (!system(command.c_str())) return 0;
    std::ifstream log(unique + ".log");
    std::stringstream lines;
    lines << log.rdbuf();
    program->log = lines.str();
    return 6;
}

// Both name the library, which the stand-in for the driver loads.
API int nvrtcGetPTXSize(Program *program, size_t *size) { return *size = program->library.size() + 10, 0; }
API int nvrtcGetPTX(Program *program, char *text) {
    return strcpy(text, ("stand-in:" + program->library).c_str()), 0;
}
// As for a GPU, there is none for an architecture that is not the device's.
API int nvrtcGetCUBINSize(Program *program, size_t *size) { return old() ? 4 : nvrtcGetPTXSize(program, size); }
API int nvrtcGetCUBIN(Program *program, char *text) { return old() ? 4 : nvrtcGetPTX(program, text); }
API int nvrtcGetProgramLogSize(Program *program, size_t *size) {
    return *size = program->log.size() + 1, 0;
}
API int nvrtcGetProgramLog(Program *program, char *text) {
    return strcpy(text, program->log.c_str()), 0;
}
