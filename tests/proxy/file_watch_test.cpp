#include "proxy/file_watch.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace pgsidecar::proxy {
namespace {

namespace fs = std::filesystem;

struct FileWatchTest : testing::Test {
  fs::path root = fs::temp_directory_path() / ("file_watch_test." + std::to_string(::getpid()));
  boost::asio::io_context loop;
  int happened = 0;
  FileWatch files{loop, [this] {
                    ++happened;
                    loop.stop();
                  }};

  FileWatchTest() { fs::create_directories(root); }
  ~FileWatchTest() override { fs::remove_all(root); }
  std::string path(const std::string& name) const { return root / name; }
  void write(const std::string& name, const std::string& text) {
    fs::create_directories((root / name).parent_path());
    std::ofstream(root / name) << text;
  }
  /// As Kubernetes mounts a ConfigMap: file -> ..data/file, ..data -> a directory of its own for each version.
  void mount(const std::string& version, const std::string& text) {
    write("map/" + version + "/file", text);
    fs::create_directory_symlink(version, root / "map/..new");
    fs::rename(root / "map/..new", root / "map/..data");
    if (!fs::is_symlink(root / "map/file")) fs::create_symlink("..data/file", root / "map/file");
  }
  bool told() {
    happened = 0;
    loop.restart();
    loop.run_for(std::chrono::seconds(10));
    return happened > 0;
  }
};

TEST_F(FileWatchTest, DirectoriesOnTheWay) {
  write("real/deep/file", "x");
  fs::create_symlink("../real/deep/file", root / "link");
  fs::create_directories(root / "links");
  fs::create_symlink("../real/deep/file", root / "links/file");
  fs::create_symlink(root / "links/file", root / "links/absolute");
  EXPECT_EQ(directories_of(path("real/deep/file")), std::set<std::string>{path("real/deep")});
  EXPECT_EQ(directories_of(path("real/deep")), (std::set<std::string>{path("real"), path("real/deep")}));
  EXPECT_TRUE(directories_of(path("links/absolute")).contains(path("links")));
  std::set<std::string> found;
  for (const std::string& one : directories_of(path("links/file"))) found.insert(fs::weakly_canonical(one));
  EXPECT_EQ(found, (std::set<std::string>{path("links"), path("real/deep")}));
  fs::create_symlink("round", root / "round");
  EXPECT_TRUE(directories_of(path("round")).contains(root));
}

TEST_F(FileWatchTest, SaysWhatChanged) {
  write("a", "1");
  write("b", "1");
  files.set({path("a"), path("b"), path("missing")}, false);
  EXPECT_TRUE(files.unchanged());
  EXPECT_EQ(files.changed(), std::set<std::string>());
  write("a.new", "22");
  fs::rename(root / "a.new", root / "a");
  write("missing", "");
  EXPECT_FALSE(files.unchanged());
  EXPECT_EQ(files.changed(), (std::set<std::string>{path("a"), path("missing")}));
  EXPECT_EQ(files.changed(), std::set<std::string>());
  // What was known already isn't forgotten by being named again.
  write("b", "333");
  files.set({path("b")}, false);
  EXPECT_EQ(files.changed(), std::set<std::string>{path("b")});
}

TEST_F(FileWatchTest, TellsOfFilesThatAreWrittenReplacedAndRemounted) {
  write("plain", "1");
  mount("..1", "1");
  files.set({path("plain"), path("map/file")}, true);
  write("plain", "22");
  EXPECT_TRUE(told());
  EXPECT_EQ(files.changed(), std::set<std::string>{path("plain")});
  write("new", "333");
  EXPECT_TRUE(told());  // something else in the directory
  EXPECT_TRUE(files.unchanged());
  fs::rename(root / "new", root / "plain");
  EXPECT_TRUE(told());
  EXPECT_EQ(files.changed(), std::set<std::string>{path("plain")});
  for (const char* version : {"..2", "..3"}) {
    mount(version, "22");
    EXPECT_TRUE(told()) << version;
    EXPECT_EQ(files.changed(), std::set<std::string>{path("map/file")}) << version;
    files.set({path("plain"), path("map/file")}, true);
  }
}

TEST_F(FileWatchTest, IsQuietUnlessAskedFor) {
  write("plain", "1");
  files.set({path("plain")}, true);
  files.set({path("plain")}, false);
  write("plain", "22");
  loop.restart();
  loop.run();  // nothing is left to wait for
  EXPECT_EQ(happened, 0);
}

}  // namespace
}  // namespace pgsidecar::proxy
