#include "admin/monitor.hpp"

#include <gtest/gtest.h>

#include <boost/asio/post.hpp>

namespace pgsidecar::admin {
namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;

// Each sample and each rest between is answered by hand.
class MonitorTest : public ::testing::Test {
 protected:
  asio::io_context control_{1};
  std::vector<Sample> samples_;
  std::chrono::seconds need_ = Monitor::kNever;
  int asked_ = 0;
  bool silent_ = false;
  std::function<void(std::shared_ptr<const pool::Snapshot>)> done_;
  std::function<void()> happened_;
  Monitor monitor_{control_, [this](auto done, auto happened) {
                     ++asked_;
                     happened_ = std::move(happened);
                     if (silent_)
                       done_ = std::move(done);
                     else
                       asio::post(control_, [done = std::move(done)] { done(std::make_shared<pool::Snapshot>()); });
                   }};

  MonitorTest() {
    monitor_.add([this](const Sample& sample) {
      samples_.push_back(sample);
      return need_;
    });
  }
  void run_for(std::chrono::milliseconds time) { control_.run_for(time), control_.restart(); }
  bool run_until(std::size_t samples) {
    for (int i = 0; i < 200 && samples_.size() < samples; ++i) run_for(50ms);
    return samples_.size() == samples;
  }
};

TEST_F(MonitorTest, RestsWhileNothingHappens) {
  monitor_.start();
  run_for(2500ms);
  EXPECT_EQ(asked_, 1);
  EXPECT_TRUE(monitor_.resting());
  happened_();
  EXPECT_EQ(asked_, 2) << "at once";
  EXPECT_TRUE(run_until(2));
  EXPECT_TRUE(samples_[1].rested);
  happened_();
  EXPECT_EQ(asked_, 2) << "once a second, not more";
  EXPECT_TRUE(run_until(3));
  EXPECT_FALSE(samples_[2].rested);
  run_for(2500ms);
  EXPECT_EQ(asked_, 3);
}

TEST_F(MonitorTest, GoesOnForWhoNeedsIt) {
  need_ = 1s;
  monitor_.start();
  EXPECT_TRUE(run_until(3));
  EXPECT_FALSE(samples_.back().rested);
  need_ = 3s;
  EXPECT_TRUE(run_until(4));
  run_for(1200ms);
  EXPECT_TRUE(monitor_.resting());
  EXPECT_TRUE(run_until(5));
  EXPECT_TRUE(samples_.back().rested);
}

TEST_F(MonitorTest, WakesOnDemand) {
  monitor_.start();
  run_for(1200ms);
  ASSERT_TRUE(monitor_.resting());
  monitor_.wake();
  monitor_.wake();
  EXPECT_EQ(asked_, 2);
}

TEST_F(MonitorTest, TellsThatTheDataLoopIsSilentAndDoesNotAskItAgain) {
  silent_ = true;
  monitor_.start();
  ASSERT_TRUE(run_until(2));
  EXPECT_EQ(asked_, 1);
  EXPECT_FALSE(samples_[0].snapshot);
  silent_ = false;
  done_(std::make_shared<pool::Snapshot>());
  EXPECT_TRUE(samples_.back().snapshot);
  happened_();
  EXPECT_TRUE(run_until(4));
  EXPECT_EQ(asked_, 2);
}

TEST_F(MonitorTest, StopEndsIt) {
  need_ = 1s;
  monitor_.start();
  run_for(100ms);
  monitor_.stop();
  happened_();
  const auto before = samples_.size();
  control_.run_for(3s);
  EXPECT_TRUE(control_.stopped()) << "nothing is left to be done";
  EXPECT_EQ(samples_.size(), before);
}

}  // namespace
}  // namespace pgsidecar::admin
