// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// server is one listening socket that answers every line (TCP, SCTP) or datagram
// (UDP) with "<what was sent> <host's name> <own address> <address of the
// asker>".
type server struct{ close func() }

func (l *Lab) serve() error {
	if SCTP() == nil {
		for _, h := range l.hosts {
			if err := h.sysctls(sctpSettings); err != nil {
				return err
			}
		}
	}
	var hosts []*Host
	for _, name := range l.nodeNames() {
		hosts = append(hosts, l.hosts[name])
	}
	for _, p := range l.options.Pods {
		hosts = append(hosts, l.hosts[p.Name])
	}
	for _, h := range hosts {
		for _, port := range append([]uint16{ControlPort}, l.options.Ports...) {
			for _, a := range []netip.Addr{h.Addr.V4, h.Addr.V6} {
				if err := h.Serve(netip.AddrPortFrom(a, port)); err != nil {
					return err
				}
			}
		}
		for _, a := range []netip.Addr{h.Addr.V4, h.Addr.V6} {
			if err := h.serveSilently(netip.AddrPortFrom(a, SilentPort)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Serve answers on one address and port of the host, over TCP, UDP and where the
// kernel can over SCTP, until the lab is closed.
func (h *Host) Serve(at netip.AddrPort) error {
	err := h.Do(func() error {
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		h.serveStreams(tcp)
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		if err := setReceiveBuffer(udp); err != nil {
			return err
		}
		go serveUDP(h.Name, udp)
		h.lab.servers = append(h.lab.servers, server{func() { udp.Close() }})
		if SCTP() != nil {
			return nil
		}
		sctp, err := listenSCTP(at)
		if err != nil {
			return err
		}
		h.serveStreams(sctp)
		return nil
	})
	if err != nil {
		return fmt.Errorf("serving on %s: %w", h.Name, err)
	}
	return nil
}

// receiveBuffer has room for thousands of small datagrams: lab compare sends as many at
// once. The default is full after about 200.
const receiveBuffer = 8 << 20

func setReceiveBuffer(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	})
	return errors.Join(err, os.NewSyscallError("setsockopt SO_RCVBUFFORCE", set))
}

func (h *Host) serveStreams(listener net.Listener) {
	s := &streamServer{host: h.Name, listener: listener, open: map[net.Conn]bool{}}
	go s.run()
	h.lab.servers = append(h.lab.servers, server{s.close})
}

type streamServer struct {
	host     string
	listener net.Listener

	mu     sync.Mutex // guards what follows
	open   map[net.Conn]bool
	closed bool
}

func (s *streamServer) run() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return // closed
		}
		s.mu.Lock()
		if s.closed {
			c.Close()
		} else {
			s.open[c] = true
			go s.answer(c)
		}
		s.mu.Unlock()
	}
}

func (s *streamServer) answer(c net.Conn) {
	defer func() {
		c.Close()
		s.mu.Lock()
		delete(s.open, c)
		s.mu.Unlock()
	}()
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(c, "%s %s %s %s\n", strings.TrimSpace(line), s.host, c.LocalAddr(), c.RemoteAddr()); err != nil {
			return
		}
	}
}

func (s *streamServer) close() {
	s.listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.open {
		c.Close()
	}
}

func serveUDP(host string, c *net.UDPConn) {
	buf := make([]byte, 512)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			if isClosed(err) {
				return
			}
			continue // an ICMP error that an earlier answer met
		}
		reply := fmt.Sprintf("%s %s %s %s\n", strings.TrimSpace(string(buf[:n])), host, c.LocalAddr(), from)
		_, _ = c.WriteToUDPAddrPort([]byte(reply), from) // the client reports a missing answer
	}
}
