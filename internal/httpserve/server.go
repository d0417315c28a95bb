// SPDX-License-Identifier: Apache-2.0

// Package httpserve runs HTTP servers whose port may be taken when they start.
package httpserve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"signalbox/internal/wait"
)

// RetryAfter is how long a server waits before it tries to listen again.
const RetryAfter = 5 * time.Second

// Server is an HTTP server at one address.
type Server struct {
	// Name is for messages: "healthz", "metrics".
	Name string
	// Addr may be unspecified (0.0.0.0 or ::): then one socket takes both IP
	// families, where the node has both.
	Addr    netip.AddrPort
	Handler http.Handler
	// Setting names the flag and the field that Addr is from, for messages; may be
	// empty.
	Setting string
	// HardFail makes Run return where it cannot listen, instead of trying
	// again.
	HardFail bool
	// Free is closed when a process that this one takes the place of has let
	// go of the port: a server that waits tries again then at once, and
	// HardFail is of effect only from then on. Nil where there is none.
	Free <-chan struct{}
	Log  *slog.Logger
	// Tried is told how each attempt to listen ended, and why a server that listened
	// cannot accept connections any more; may be nil.
	Tried func(error)
	// Listen is net.Listen when nil.
	Listen func(network, addr string) (net.Listener, error)
}

// Run serves until ctx ends and returns nil then; the port is free at once. It
// returns an error only with HardFail.
func (s *Server) Run(ctx context.Context) error {
	for free, said := s.Free, false; ; {
		if wait.Closed(free) {
			free = nil
		}
		l, err := s.listen()
		s.tried(err)
		listened := err == nil
		if listened {
			s.Log.Info("listening", "server", s.Name, "address", l.Addr().String())
			if err = Serve(ctx, l, s.Handler, s.Log); err == nil {
				return nil
			}
			s.tried(err)
			said = false
		}
		err = fmt.Errorf("%s server at %s: %w", s.Name, s.Addr, s.explain(err))
		if s.HardFail && free == nil && !listened {
			return err
		}
		if !said {
			s.Log.Error("cannot listen; trying again", "server", s.Name, "address", s.Addr.String(), "every", RetryAfter, "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil
		case <-free:
		case <-time.After(RetryAfter):
		}
	}
}

func (s *Server) tried(err error) {
	if s.Tried != nil {
		s.Tried(err)
	}
}

// explain adds what an operator can do.
func (s *Server) explain(err error) error {
	remedy := ""
	if errors.Is(err, syscall.EADDRINUSE) {
		remedy = "; another kube-proxy or signalbox may have the port, as `ss -ltnp` shows: end it"
	}
	if s.Setting != "" && remedy != "" {
		remedy += ", or choose another address with " + s.Setting
	} else if s.Setting != "" {
		remedy = "; the address is from " + s.Setting
	}
	return fmt.Errorf("%w%s", err, remedy)
}

func (s *Server) listen() (net.Listener, error) {
	listen := s.Listen
	if listen == nil {
		listen = net.Listen
	}
	host := s.Addr.Addr().String()
	if s.Addr.Addr().IsUnspecified() {
		host = "" // Go's word for both families at once
	}
	return listen("tcp", net.JoinHostPort(host, fmt.Sprint(s.Addr.Port())))
}

// The bounds of a server that answers small questions of strangers: nobody may hold a
// connection without asking anything, or without reading the answer. A profile of
// /debug/pprof takes as long as it is asked to, and must end before answerTimeout.
const (
	headerTimeout  = 10 * time.Second
	requestTimeout = 30 * time.Second
	answerTimeout  = 2 * time.Minute
	idleTimeout    = 2 * time.Minute
	maxHeader      = 16 << 10
	maxBody        = 64 << 10
)

// Serve answers at l until ctx ends, and returns nil then with l and every connection
// closed. All servers of the process share a number of connections.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	return serve(ctx, l, h, log, shared())
}

func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger, limits *limits) error {
	server := &http.Server{
		Handler:           http.MaxBytesHandler(h, maxBody),
		ReadHeaderTimeout: headerTimeout, ReadTimeout: requestTimeout, WriteTimeout: answerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader, ConnState: limits.follow,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	err := server.Serve(listener{l, limits})
	_ = server.Close() // after an error of Accept
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
