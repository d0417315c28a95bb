// SPDX-License-Identifier: Apache-2.0

package httpserve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"signalbox/internal/netlab"
)

var quiet = slog.New(slog.DiscardHandler)

func hello() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
}

func newHost(t *testing.T) *netlab.Host {
	t.Helper()
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lab.Close() })
	return lab.Host("node1")
}

func get(client *http.Client, url string) error {
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "hello" {
		return errors.Join(err, errors.New("the body is "+string(body)))
	}
	return nil
}

// run starts a server and returns once it listens; the function ends it and
// waits for that.
func run(t *testing.T, s *Server) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	tried, done := make(chan error, 10), make(chan error, 1)
	s.Tried = func(err error) { tried <- err }
	go func() { done <- s.Run(ctx) }()
	if err := <-tried; err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestBothFamiliesAndTheSamePortAgain(t *testing.T) {
	host := newHost(t)
	for _, unspecified := range []string{"0.0.0.0:10256", "[::]:10256"} {
		client := host.Client()
		// The port is free as soon as Run has returned, whatever connections
		// clients keep.
		for range 3 {
			s := &Server{Name: "test", Addr: netip.MustParseAddrPort(unspecified), Handler: hello(), HardFail: true, Log: quiet, Listen: host.Listen}
			end := run(t, s)
			for _, url := range []string{"http://127.0.0.1:10256", "http://[::1]:10256"} {
				if err := get(client, url); err != nil {
					t.Errorf("%s at %s: %v", url, unspecified, err)
				}
			}
			end()
			if err := get(client, "http://127.0.0.1:10256"); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("after the end: %v", err)
			}
		}
	}
}

func TestOneAddressIsOneAddress(t *testing.T) {
	host := newHost(t)
	s := &Server{Name: "test", Addr: netip.MustParseAddrPort("127.0.0.1:10249"), Handler: hello(), Log: quiet, Listen: host.Listen}
	defer run(t, s)()
	client := host.Client()
	if err := get(client, "http://127.0.0.1:10249"); err != nil {
		t.Error(err)
	}
	for _, url := range []string{"http://[::1]:10249", "http://" + netip.AddrPortFrom(host.Addr.V4, 10249).String()} {
		if err := get(client, url); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v", url, err)
		}
	}
}

func TestHardFail(t *testing.T) {
	host := newHost(t)
	taken, err := host.Listen("tcp", ":10256")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s := &Server{Name: "healthz", Addr: netip.MustParseAddrPort("0.0.0.0:10256"), Handler: hello(), HardFail: true, Log: quiet, Listen: host.Listen}
	if err := s.Run(t.Context()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the error is %v", err)
	}
}

// idle is a listener that nobody connects to.
type idle struct{ closed chan struct{} }

func (l idle) Accept() (net.Conn, error) { <-l.closed; return nil, net.ErrClosed }
func (l idle) Addr() net.Addr            { return &net.TCPAddr{} }
func (l idle) Close() error              { close(l.closed); return nil }

func TestATakenPortIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var tried []time.Duration
		s := &Server{
			Name: "test", Addr: netip.MustParseAddrPort("0.0.0.0:1"), Handler: hello(), Log: quiet,
			Listen: func(string, string) (net.Listener, error) {
				if time.Since(began) < 8*time.Second {
					return nil, syscall.EADDRINUSE
				}
				return idle{make(chan struct{})}, nil
			},
			Tried: func(err error) {
				if (err == nil) != (time.Since(began) >= 8*time.Second) {
					t.Errorf("after %v: %v", time.Since(began), err)
				}
				tried = append(tried, time.Since(began))
			},
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		time.Sleep(time.Minute)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if len(tried) != 3 || tried[1] != RetryAfter || tried[2] != 2*RetryAfter {
			t.Errorf("tried after %v", tried)
		}
	})
}

func TestAServerThatNeverListensEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{Name: "test", Addr: netip.MustParseAddrPort("0.0.0.0:1"), Log: quiet, Listen: func(string, string) (net.Listener, error) { return nil, syscall.EACCES }}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		time.Sleep(time.Hour)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// exhausted is a listener whose Accept finds no memory in the kernel.
type exhausted struct{ idle }

func (exhausted) Accept() (net.Conn, error) { return nil, syscall.ENOMEM }

// A server that cannot accept connections is reported, and listens again. HardFail is about
// a port that is taken.
func TestServerThatEndsListensAgain(t *testing.T) {
	for _, hard := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			var tried []string
			s := &Server{
				Name: "test", Addr: netip.MustParseAddrPort("0.0.0.0:1"), Handler: hello(), HardFail: hard, Log: quiet,
				Listen: func(string, string) (net.Listener, error) {
					if time.Since(began) < 2*RetryAfter {
						return exhausted{idle{make(chan struct{})}}, nil
					}
					return idle{make(chan struct{})}, nil
				},
				Tried: func(err error) { tried = append(tried, fmt.Sprint(time.Since(began), " ", err)) },
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := s.Run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
			want := []string{"0s <nil>", "0s cannot allocate memory", "5s <nil>", "5s cannot allocate memory", "10s <nil>"}
			if !slices.Equal(tried, want) {
				t.Errorf("HardFail %v: %q, want %q", hard, tried, want)
			}
		})
	}
}

// A port that another process lets go of is tried again then, and not only in
// its turn; what counts with HardFail comes after that.
func TestAPortThatComesFree(t *testing.T) {
	for _, taken := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			var tried []time.Duration
			free := make(chan struct{})
			s := &Server{
				Name: "test", Addr: netip.MustParseAddrPort("0.0.0.0:1"), Handler: hello(), Log: quiet, HardFail: true, Free: free,
				Listen: func(string, string) (net.Listener, error) {
					tried = append(tried, time.Since(began))
					if taken || time.Since(began) < time.Second {
						return nil, syscall.EADDRINUSE
					}
					return idle{make(chan struct{})}, nil
				},
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			time.Sleep(time.Second)
			close(free)
			time.Sleep(time.Minute)
			cancel()
			if err := <-done; errors.Is(err, syscall.EADDRINUSE) != taken {
				t.Errorf("Run: %v", err)
			}
			if len(tried) != 2 || tried[1] != time.Second {
				t.Errorf("tried after %v", tried)
			}
		})
	}
}
